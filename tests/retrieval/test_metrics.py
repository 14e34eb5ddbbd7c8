"""Metrics against hand-worked cases, slow references and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from retrieval.metrics.feedback import auc, gauc
from retrieval.metrics.ranking import RankingSums, rank_among


def slow_rank(scores: list[float], target: int, masked: set[int]) -> int:
    """1 + other unmasked candidates that are not lower; a NaN is never lower."""
    return 1 + sum(
        1 for item, score in enumerate(scores) if item != target and item not in masked and not score < scores[target]
    )


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), min_size=2, max_size=12), st.data())
def test_rank_equals_plain_counting_with_ties_nan_and_masks(scores, data):
    target = data.draw(st.integers(0, len(scores) - 1))
    masked = data.draw(st.sets(st.integers(0, len(scores) - 1))) - {target}
    listed = np.array([[0 if i in masked else i + 1 for i in range(len(scores))]])
    actual = rank_among(np.array([scores]), listed, np.array([target + 1]), np.array([scores[target]]))
    assert actual[0] == slow_rank(scores, target, masked)


def test_equal_scores_for_all_items_give_the_worst_rank():
    rank = rank_among(np.zeros((3, 50)), np.tile(np.arange(1, 51), (3, 1)), np.array([1, 20, 50]), np.zeros(3))
    assert rank.tolist() == [50, 50, 50]


def test_ranking_sums_match_hand_computation():
    totals = RankingSums([1, 3])
    totals.add(np.array([1, 2, 4]), np.array([True, False, False]))
    assert totals.averages() == {
        "hr@1": 1 / 3,
        "hr@3": 2 / 3,
        "ndcg@1": 1 / 3,
        "ndcg@3": (1 + 1 / math.log2(3)) / 3,
        "mrr@1": 1 / 3,
        "mrr@3": (1 + 1 / 2) / 3,
    }
    assert totals.repeats == 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 30))
def test_merged_sums_equal_the_sums_of_all_ranks(ranks, cut):
    whole, left, right = RankingSums([2, 5]), RankingSums([2, 5]), RankingSums([2, 5])
    whole.add(np.array(ranks))
    left.add(np.array(ranks[:cut], np.int64))
    right.add(np.array(ranks[cut:], np.int64))
    left.merge(right)
    assert left.averages() == pytest.approx(whole.averages(), abs=1e-12)


def test_ndcg_equals_scikit_learn_without_ties():
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(40.0), (25, 1)), axis=1)
    target = rng.integers(0, 40, 25)
    totals = RankingSums([10])
    totals.add(rank_among(scores, np.tile(np.arange(1, 41), (25, 1)), target + 1, scores[np.arange(25), target]))
    relevance = np.eye(40)[target]
    assert totals.averages()["ndcg@10"] == pytest.approx(ndcg_score(relevance, scores, k=10), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([-(1 << 31), 0, 1, 1 << 30, 1 << 31, 1 << 40]),
            st.integers(0, 1),
            st.sampled_from([-2.5, -0.3, -0.0, 0.0, 0.1, 0.5, 0.9]),
        ),
        max_size=40,
    )
)
@settings(max_examples=300)
def test_auc_and_gauc_equal_scikit_learn(dtype, rows):
    user, label, score = (np.array(c) for c in zip(*rows, strict=True)) if rows else (np.zeros(0, int),) * 3
    score = score.astype(dtype)
    one_class = len(set(label.tolist())) < 2
    assert auc(label, score) == (None if one_class else pytest.approx(roc_auc_score(label, score), abs=1e-12))
    areas = [
        (roc_auc_score(label[user == u], score[user == u]), (user == u).sum())
        for u in sorted(set(user.tolist()))
        if len(set(label[user == u].tolist())) == 2
    ]
    expected = sum(a * n for a, n in areas) / sum(n for _, n in areas) if areas else None
    assert gauc(user, label, score) == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_nan_score_lowers_auc_for_either_label():
    label = np.array([0, 0, 1, 1])
    assert auc(label, np.array([0.1, 0.2, np.nan, 0.9])) == 0.5  # the positive ranks below both negatives
    assert auc(label, np.array([np.nan, 0.2, 0.8, 0.9])) == 0.5  # the negative ranks above both positives
    assert auc(label, np.full(4, np.nan)) == 0.0
    assert auc(label, np.full(4, np.nan, np.float32)) == 0.0
