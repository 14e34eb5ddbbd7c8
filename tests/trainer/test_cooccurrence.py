"""Item vectors initialised from co-occurrence factors: slow references, and no use of held-out clicks."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest

from retrieval.sources.sessions import TrainSessions
from tests.support.engine import build, write_log
from tests.support.runs import SMALL
from trainer.__main__ import main
from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.option_groups import ModelOptions, TrainOptions
from trainer.task.registry import model_task_of
from trainer.training.cooccurrence import Matrix, counted_clicks, factors, positive_pmi, ppmi_vectors
from trainer.training.objective import INPUT, ITEM

Clicks = tuple[np.ndarray, np.ndarray]
"""Session and dense item id of each click, in order."""


def dense(matrix: Matrix) -> np.ndarray:
    n = len(matrix.offset) - 1
    row = np.repeat(np.arange(n), np.diff(matrix.offset))
    assert (np.diff(row * n + matrix.column) > 0).all()
    assert (matrix.value > 0).all()
    out = np.zeros((n, n))
    out[row, matrix.column] = matrix.value
    return out


def slow_ppmi(clicks: Clicks, n: int) -> np.ndarray:
    """Pair by pair: 1 / distance up to five clicks, contexts to the power 0.75, mean of both directions."""
    count = defaultdict(float)
    for session in np.unique(clicks[0]):
        items = clicks[1][clicks[0] == session].tolist()
        for i, a in enumerate(items):
            for j, b in enumerate(items):
                if 0 < abs(i - j) <= 5:
                    count[a, b] += 1 / abs(i - j)
    of_item = [sum(count.get((a, b), 0.0) for b in range(1, n + 1)) for a in range(1, n + 1)]
    contexts = sum(c**0.75 for c in of_item)
    out = np.zeros((n, n))
    for (a, b), c in count.items():
        for one, other in ((a, b), (b, a)):
            pmi = math.log(c / (of_item[one - 1] * of_item[other - 1] ** 0.75 / contexts))
            out[a - 1, b - 1] += max(pmi, 0.0) / 2
    return out


def test_ppmi_equals_a_loop_over_pairs(fifty):
    n, (session, item) = fifty.manifest.n_items, counted_clicks(fifty, 2)
    few = session[session < 8], item[session < 8]
    actual, expected = positive_pmi(*few, n), slow_ppmi(few, n)
    assert (expected > 0).sum() > 100
    assert dense(actual) == pytest.approx(expected, abs=1e-6)
    for at_once in (1, 300, 1_000):  # in chunks of rows
        assert np.array_equal(dense(positive_pmi(*few, n, at_once)), dense(actual))


def test_counted_clicks_equal_those_of_the_retrieval_sources(fifty):
    for holdout in (1, 2):
        expected = TrainSessions.of(fifty, holdout)
        theirs = [expected.items[a:b].tolist() for a, b in itertools.pairwise(expected.offset)]
        session, item = counted_clicks(fifty, holdout)
        assert sorted(theirs) == sorted(item[session == s].tolist() for s in range(len(theirs)))


def test_factors_are_the_eigenvectors_of_largest_absolute_eigenvalue():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    value = np.array([9.0, -7.0, 5.0, 3.0, *rng.normal(size=56) * 0.1])
    matrix = (basis * value) @ basis.T
    everything = Matrix(
        np.arange(61) * 60, np.tile(np.arange(60, dtype=np.int32), 60), matrix.ravel().astype(np.float32)
    )
    actual = factors(everything, 4, seed=1).numpy()
    magnitude = (basis[:, :4] * np.abs(value[:4])) @ basis[:, :4].T  # the sign of a factor is free
    assert actual.shape == (60, 4)
    assert actual @ actual.T == pytest.approx(magnitude, abs=1e-3)


def test_factors_beyond_the_rank_and_of_items_without_a_pair_are_zero_despite_rounding():
    """One eigenvector, over twenty of thirty items."""
    row = np.random.default_rng(0).random(20).astype(np.float32) + 1
    offset = np.minimum(np.arange(31), 20) * 20
    one = Matrix(offset, np.tile(np.arange(20, dtype=np.int32), 20), np.outer(row, row).ravel())
    actual = factors(one, 4, seed=1).numpy()
    assert not actual[:, 1:].any()
    assert not actual[20:].any()
    assert np.abs(actual[:20, 0]) == pytest.approx(row, rel=1e-4)


def test_items_clicked_together_start_with_similar_vectors(tmp_path):
    """Two groups of items without common sessions, and two items without a neighbour in train."""
    rng, rows = np.random.default_rng(0), []
    for user in range(40):
        items = [*(rng.choice(10, 10, replace=False) + 10 * (user % 2)), 20, 21]
        rows += [(user, int(item), 1, 0, 0, 0, "c", 1, 0, 0) for item in items]
    write_log(tmp_path / "log.csv", rows)
    dataset = build([f"input={tmp_path / 'log.csv'}", f"output={tmp_path / 'data'}", "scenario=qb_video"])
    raw = dataset.items(["item_id"])["item_id"].to_numpy()
    vector = ppmi_vectors(dataset, 2, 30, seed=0).numpy()[np.argsort(raw)]
    assert vector.shape == (22, 30)
    assert np.linalg.norm(vector, axis=1) == pytest.approx([1.0] * 20 + [0.0] * 2, abs=1e-5)
    assert (vector[:10] @ vector[10:20].T) == pytest.approx(0.0, abs=1e-5)
    assert (vector[:10] @ vector[:10].T).mean() > 0.05


def log_with(folder, last_two):
    """A log with fixed train clicks and the given last two clicks of each user."""
    rng, rows = np.random.default_rng(0), []
    for user, last in enumerate(last_two):
        items = [*range(user % 5, 30, 5), *rng.choice(30, 8, replace=False), *last]
        rows += [(user, int(item), 1, 0, 0, 0, "c", 1, 0, 0) for item in items]
    folder.mkdir()
    write_log(folder / "log.csv", rows)
    return build([f"input={folder / 'log.csv'}", f"output={folder / 'data'}", "scenario=qb_video"])


def begun(dataset, holdout: int) -> dict[str, np.ndarray]:
    network = ModelOptions(embedding_dim=8, hidden_size=8, tie_embeddings=False)
    train = TrainOptions(ppmi_start=0.7)
    config = TrainerConfig(data="", output="", model="gru4rec", tasks=["next"], network=network, train=train)
    model_task = model_task_of(config, dataset, World.alone())
    train_step = model_task.train_step(1)
    model_task.init_from_counts(train_step, holdout)
    return {name: train_step.tables[name].vector.numpy() for name in (ITEM, INPUT)}


def test_initial_vectors_do_not_depend_on_held_out_clicks(tmp_path):
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, 30, (20, 2))
    one = log_with(tmp_path / "one", drawn)
    other = log_with(tmp_path / "other", np.stack([drawn[:, 0], (drawn[:, 1] + 7) % 30], axis=1))
    third = log_with(tmp_path / "third", (drawn + 11) % 30)
    first = begun(one, 2)
    assert np.linalg.norm(first[ITEM][1:], axis=1) == pytest.approx(0.7, abs=1e-5)
    assert np.array_equal(first[ITEM], first[INPUT])
    for dataset in (other, third):
        assert np.array_equal(first[ITEM], begun(dataset, 2)[ITEM])
    assert np.array_equal(begun(one, 1)[ITEM], begun(other, 1)[ITEM])  # a refit also uses the valid click
    assert not np.allclose(begun(one, 1)[ITEM], begun(third, 1)[ITEM], atol=1e-3)
    assert not np.allclose(begun(one, 1)[ITEM], first[ITEM], atol=1e-3)


def test_run_and_refit_are_initialised_from_their_own_train_clicks(fifty, tmp_path):
    options = ["model=gru4rec", "train.ppmi_start=2", "train.learning_rate=1e-9", "train.refit=true", "train.epochs=1"]
    assert main([f"data={fifty.path}", f"output={tmp_path / 'run'}", *SMALL, *options]) == 0
    for bundle, holdout in (("bundle-selected", 2), ("bundle", 1)):
        table = pq.read_table(tmp_path / "run" / bundle / "items.parquet")
        actual = np.stack(table["vector"].to_numpy(zero_copy_only=False))[:, :-1]
        expected = 2 * ppmi_vectors(fifty, holdout, actual.shape[1], 0).numpy()
        counted = expected.any(axis=1)
        assert counted.sum() > 50
        assert actual[counted] == pytest.approx(expected[counted], abs=1e-4)
        assert actual[~counted].any(axis=1).all()
