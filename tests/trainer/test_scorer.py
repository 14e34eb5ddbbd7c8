"""Invariance of scores to later clicks, outcomes, and the order and size of blocks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import sparse

from trainer.config import HEADS, RANK_HEADS, TrainerConfig
from trainer.data.batch import feedback_rows
from trainer.data.ragged import Ragged
from trainer.data.ranking_rows import block_rows
from trainer.data.reader import SessionReader
from trainer.distributed.world import World
from trainer.inference.export import score_sessions
from trainer.inference.target_ranks import exact_ranks, rank_request
from trainer.inference.validation import seen_pairs
from trainer.option_groups import ModelOptions
from trainer.task.registry import model_task_of

TASKS = ["click", "like"]
MODELS = [
    *({"model": "hybrid", "head": head} for head in HEADS),
    *({"model": "hybrid", "encoder": encoder} for encoder in ("srgnn", "sasrec", "nextitnet", ["gru4rec", "srgnn"])),
    {"model": "hybrid", "network": {"feedback_features": ["category"], "feedback_feature_dim": 3}},
    *({"model": model} for model in RANK_HEADS),
]


@pytest.fixture(scope="module")
def sessions(fifty):
    reader = SessionReader(fifty, exposures=True, holdout=2)
    return reader.read(np.arange(len(reader.groups)))


def untrained(dataset, changes):
    tasks = TASKS if changes["model"].startswith("rank") else ["next", *TASKS]
    network = {"embedding_dim": 8, "hidden_size": 8, "tower": 8, "positions": 64} | changes.get("network", {})
    config = TrainerConfig(data="", output="", tasks=tasks, **changes | {"network": ModelOptions(**network)})
    model_task = model_task_of(config, dataset, World.alone())
    return config, model_task.scorer(model_task.train_step(1))


def score(dataset, sessions, changes) -> dict[tuple[int, int, int, int], float]:
    """Score of each row of the valid blocks, by task, user, item and number of earlier rows of that item there."""
    config, scorer = untrained(dataset, changes)
    visible = sessions.items.lengths - 2
    rows = feedback_rows(sessions, exposures=True)
    rows = rows.select(rows.position == visible[rows.session])
    if config.is_ranking_model:
        flat = block_rows(sessions, rows)
        actual = scorer.feedback(scorer.features(flat))
    else:
        actual = scorer.feedback(scorer.states(sessions, visible[:, None])[:, 0], rows)
    out = {}
    for number, task in enumerate(TASKS):
        for user, item, value in zip(sessions.user_id[rows.session], rows.item, actual[task], strict=True):
            copy = sum(key[:3] == (number, user, item) for key in out)
            out[number, int(user), int(item), copy] = float(value)
    return out


def shuffled_within_blocks(sessions, seed=0):
    """The same sessions with the rows of each block in another order."""
    rng = np.random.default_rng(seed)
    shown = sessions.exposure_items
    order = np.lexsort((rng.random(len(shown.values)), sessions.exposure_position.values, shown.row))
    names = ("exposure_items", "exposure_position", "exposure_feedback")
    return replace(sessions, **{n: Ragged(shown.offset, getattr(sessions, n).values[order]) for n in names})


def first_of_each_block(sessions):
    """The same sessions with only the first row of each block."""
    shown, position = sessions.exposure_items, sessions.exposure_position.values
    first = np.ones(len(position), bool)
    first[1:] = (np.diff(position) != 0) | (np.diff(shown.row) != 0)
    return only_rows(sessions, first)


def only_rows(sessions, keep):
    """The same sessions with some of the rows shown."""
    offset = np.concatenate([[0], np.cumsum(np.bincount(sessions.exposure_items.row[keep], minlength=len(sessions)))])
    names = ("exposure_items", "exposure_position", "exposure_feedback")
    return replace(sessions, **{n: Ragged(offset, getattr(sessions, n).values[keep]) for n in names})


def with_other_outcomes(sessions):
    """The same sessions with every outcome of rows and clicks flipped."""
    shown, clicked = sessions.exposure_feedback, sessions.feedback
    return replace(
        sessions,
        exposure_feedback=Ragged(shown.offset, shown.values ^ 0x87),
        feedback=Ragged(clicked.offset, clicked.values ^ 7),
    )


def with_other_last_clicks(sessions):
    """The same sessions with other clicks after those visible to the valid query."""
    values = sessions.items.values.copy()
    for back in (1, 2):
        values[sessions.items.offset[1:] - back] = back
    return replace(sessions, items=Ragged(sessions.items.offset, values))


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_scores_depend_only_on_clicks_before_the_block(fifty, sessions, changes):
    torch.manual_seed(0)
    plain = score(fifty, sessions, changes)
    assert len(set(plain.values())) > len(plain) // 4
    for change in (shuffled_within_blocks, with_other_outcomes, with_other_last_clicks):
        assert score(fifty, change(sessions), changes) == pytest.approx(plain, abs=1e-5), change.__name__
    some = score(fifty, first_of_each_block(sessions), changes)
    assert 0 < len(some) < len(plain)
    assert some == pytest.approx({key: plain[key] for key in some}, abs=1e-5)
    half = np.arange(len(sessions))[::-2]
    part = score(fifty, sessions.take(half), changes)
    assert part == pytest.approx({key: plain[key] for key in part}, abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_validation_ranks_follow_the_evaluations_rules_for_ties_nan_and_masks(chunk, monkeypatch):
    """Against plain counting: rank = 1 + other unseen candidates not scored lower; NaN or a seen target is a miss."""
    monkeypatch.setattr("trainer.inference.target_ranks.CHUNK_NUMBERS", {"cpu": chunk})
    rng = np.random.default_rng(0)
    vector = torch.from_numpy(rng.integers(-1, 2, (21, 3)).astype(np.float32))
    vector[5], vector[9, 0] = torch.nan, -torch.inf
    query = torch.from_numpy(rng.integers(-1, 2, (60, 3)).astype(np.float32))
    candidates, target = np.array([1, 2, 3, 5, 8, 9, 12, 13, 18, 20]), rng.choice([1, 3, 5, 9, 12, 20], 60)
    seen = np.stack([rng.integers(0, 60, 90), rng.integers(1, 21, 90)])
    scorer = SimpleNamespace(item_vectors=lambda items: vector[items], dimension=3)
    for pairs in (seen, None):
        masked_pairs = None if pairs is None else torch.from_numpy(pairs)
        request = rank_request(scorer, query, torch.from_numpy(target), masked_pairs)
        actual = exact_ranks(scorer, request, torch.from_numpy(candidates))
        for q in range(60):
            masked = set() if pairs is None else set(seen[1, seen[0] == q].tolist())
            scores = {c: float(vector[c] @ query[q]) for c in candidates.tolist()}
            own = scores[int(target[q])]
            others = [s for c, s in scores.items() if c != target[q] and c not in masked]
            if target[q] in masked or not np.isfinite(own):
                assert actual[q] > len(candidates)
            else:
                assert actual[q] == 1 + sum(not s < own for s in others)


@pytest.mark.parametrize("dimension", [3, 33, 65, 129])
def test_items_with_equal_vectors_tie_however_their_products_are_rounded(dimension):
    """Of 50 equal items among 60 others of lower score every target has rank 50; half of them have a counted term."""
    generator = torch.Generator().manual_seed(dimension)
    vector = torch.randn(1, dimension, generator=generator).repeat(111, 1)
    vector[51:] *= 0.5
    vector[110] = 0.0  # rounding errors are those of the longest vector
    query = torch.randn(64, dimension, generator=generator)
    query *= torch.sign(query @ vector[:1].T)
    target = torch.randint(1, 51, (64,), generator=generator)
    scorer = SimpleNamespace(item_vectors=lambda items: vector[items], dimension=dimension)
    term = sparse.csr_matrix(np.tile(np.arange(111) <= 25, (64, 1)).astype(np.float32))
    for added, ranks in ((None, [50] * 64), (term, [25 if item <= 25 else 50 for item in target.tolist()])):
        request = rank_request(scorer, query, target, None, added)
        assert exact_ranks(scorer, request, torch.arange(1, 111)).tolist() == ranks


def test_seen_pairs_are_the_clicks_visible_to_the_query(sessions):
    visible = sessions.items.lengths - 2
    row, item = seen_pairs(sessions, visible).tolist()
    expected = [(r, i) for r in range(len(sessions)) for i in sessions.take(np.array([r])).items.values[: visible[r]]]
    assert list(zip(row, item, strict=True)) == expected


@pytest.mark.parametrize("changes", [{"model": "hybrid"}, {"model": "rank_mmoe"}], ids=str)
def test_rows_after_the_test_click_are_scored_from_the_last_state(fifty, sessions, changes):
    """The scores equal those with one more click appended, after which the rows are the block of the test click."""
    _, scorer = untrained(fifty, changes)
    n = sessions.items.lengths
    late = only_rows(sessions, sessions.exposure_position.values == n[sessions.exposure_items.row])
    offset, ends = sessions.items.offset + np.arange(len(n) + 1), sessions.items.offset[1:]
    longer = {k: Ragged(offset, np.insert(getattr(late, k).values, ends, 1)) for k in ("items", "feedback")}
    scored = []
    for some in (late, replace(late, **longer)):
        parts = score_sessions(some, scorer, ["test", "next"], exposures=True)
        rows = pa.concat_tables([table for kind, table in parts if kind == "feedback-test"]).to_pylist()
        scored.append(sorted((r["task"], r["user_id"], r["item"], r["label"], r["score"]) for r in rows))
    assert len(scored[0]) == len(TASKS) * len(late.exposure_items.values) > 40
    assert [row[:4] for row in scored[0]] == [row[:4] for row in scored[1]]
    assert [row[4] for row in scored[0]] == pytest.approx([row[4] for row in scored[1]], abs=1e-6)
