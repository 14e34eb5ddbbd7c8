"""Intervals and significance tests against SciPy and hand-computed numbers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, norm

from retrieval.metrics.ranking import RankingSums
from retrieval.metrics.significance import compare, gains, holm, interval


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_mean_gains_equal_the_metrics(ranks):
    rank, totals = np.array(ranks), RankingSums([5, 20])
    totals.add(rank)
    for name, value in totals.averages().items():
        assert gains(rank, name).mean() == pytest.approx(value, abs=1e-12)


def test_interval_equals_scipys_and_has_the_nominal_coverage():
    rng = np.random.default_rng(0)
    value = gains(rng.integers(1, 60, 3_000), "ndcg@20")
    peer = bootstrap((value,), np.mean, method="percentile", n_resamples=2_000, rng=rng).confidence_interval
    assert interval(value) == pytest.approx(tuple(peer), abs=0.05 * (peer.high - peer.low))
    inside = 0
    for _ in range(400):
        low, high = interval((rng.random(500) < 0.1).astype(float))
        inside += low <= 0.1 <= high
    assert 0.92 * 400 <= inside <= 0.98 * 400


def test_difference_and_mcnemar_p_match_hand_computation():
    """Of 20 users, 9 are hits of the first only and 1 of the second only: McNemar's exact p is 22 / 1024."""
    first = np.array([1] * 9 + [30] + [2] * 5 + [30] * 5)
    second = np.array([30] * 9 + [1] + [2] * 5 + [30] * 5)
    actual = compare(first, second, "hr@20")
    assert actual.difference == pytest.approx(8 / 20)
    assert actual.p == pytest.approx(22 / 1024)
    assert actual.low < 8 / 20 < actual.high
    same = compare(first, first, "ndcg@20")
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_wilcoxon_p_equals_the_normal_approximation_on_many_users():
    """Differences as fractions: 1/2 - 1/3 and 1/6 - 0 tie, which as floats differ."""
    rng = np.random.default_rng(1)
    first, second = rng.integers(1, 30, 4_000), rng.integers(1, 31, 4_000)
    gain = [Fraction(1, rank) if rank <= 20 else Fraction(0) for rank in range(1, 32)]
    d = [gain[a - 1] - gain[b - 1] for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    d = [each for each in d if each]
    sizes = sorted({abs(each) for each in d})
    assert len(sizes) < len(set(np.abs(gains(first, "mrr@20") - gains(second, "mrr@20")).tolist()) - {0.0})
    count = np.array([sum(abs(each) == size for each in d) for size in sizes])
    mean_rank = dict(zip(sizes, np.cumsum(count) - (count - 1) / 2, strict=True))
    w = sum(mean_rank[each] for each in d if each > 0)
    n = len(d)
    spread = np.sqrt(n * (n + 1) * (2 * n + 1) / 24 - (count**3 - count).sum() / 48)
    z = (w - n * (n + 1) / 4) / spread
    assert compare(first, second, "mrr@20").p == pytest.approx(2 * norm.sf(abs(z)), rel=1e-12)


def test_holm_matches_hand_computation_and_is_monotonic():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
