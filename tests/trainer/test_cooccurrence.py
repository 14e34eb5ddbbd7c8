"""Item vectors that begin as factors of co-occurrence: slow versions, and that no held-out click enters."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from retrieval.sources.sessions import TrainSessions
from tests.support.engine import build, write_log
from tests.trainer.test_run import SMALL
from trainer.__main__ import main
from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.option_groups import ModelOptions, TrainOptions
from trainer.task.registry import family_of
from trainer.training.cooccurrence import factors, near_clicks, positive_pmi, start_vectors
from trainer.training.objective import INPUT, ITEM


def slow_ppmi(sessions: TrainSessions) -> np.ndarray:
    """Pair by pair: 1 / distance up to five clicks, contexts to the power .75, the mean of both directions."""
    n, count = sessions.n_items, defaultdict(float)
    for begin, end in zip(sessions.offset, sessions.offset[1:], strict=False):
        items = sessions.items[begin:end].tolist()
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


def test_ppmi_is_that_of_a_loop_over_pairs(fifty):
    sessions = TrainSessions.of(fifty)
    few = TrainSessions(
        sessions.user_id[:8], sessions.offset[:9], sessions.items[: sessions.offset[8]], sessions.n_items
    )
    actual, expected = positive_pmi(near_clicks(few)).toarray(), slow_ppmi(few)
    assert (expected > 0).sum() > 100
    assert actual == pytest.approx(expected, abs=1e-5)


def test_factors_are_those_of_the_eigenvectors_of_the_largest_magnitude():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    value = np.array([9.0, -7.0, 5.0, 3.0, *rng.normal(size=56) * 0.1])
    dense = (basis * value) @ basis.T
    actual = factors(sparse.csr_matrix(dense), 4, seed=1)
    magnitude = (basis[:, :4] * np.abs(value[:4])) @ basis[:, :4].T  # the sign of a factor is free
    assert actual.shape == (60, 4)
    assert actual @ actual.T == pytest.approx(magnitude, abs=1e-3)


def test_items_that_are_clicked_together_begin_together(tmp_path):
    """Two groups of items that share no session; an item whose sessions hold it alone has no neighbour."""
    rng, rows = np.random.default_rng(0), []
    for user in range(40):
        rows += [(user, int(item)) for item in rng.choice(10, 6, replace=False) + 100 * (user % 2)]
    sessions = sessions_of([(user, item, i) for i, (user, item) in enumerate(rows)], n_items=111)
    vector = start_vectors(sessions, 8, seed=0)
    present = np.linalg.norm(vector, axis=1)
    first, second = np.arange(10), np.arange(10) + 100
    assert present[[*first, *second]] == pytest.approx(1.0, abs=1e-5)
    assert not present[10:100].any()
    assert (vector[first] @ vector[second].T) == pytest.approx(0.0, abs=1e-4)
    assert (vector[first] @ vector[first].T).mean() > 0.3


def sessions_of(rows: list[tuple[int, int, int]], n_items: int) -> TrainSessions:
    """Train sessions of rows (user, item from 0, place) in the order of users."""
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    user, clicks = np.unique([row[0] for row in rows], return_counts=True)
    items = np.array([row[1] + 1 for row in rows], np.int32)
    return TrainSessions(user.astype(np.int64), np.concatenate([[0], np.cumsum(clicks)]), items, n_items)


def log_with(folder, last_two):
    """Users whose train clicks are always the same and whose last two clicks are given."""
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
    family = family_of(config, dataset, World.alone())
    train_step = family.train_step(1)
    family.begin(train_step, holdout)
    return {name: train_step.tables[name].vector.numpy() for name in (ITEM, INPUT)}


def test_no_valid_or_test_click_enters_before_the_refit(tmp_path):
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
    assert np.array_equal(begun(one, 1)[ITEM], begun(other, 1)[ITEM])  # a refit has seen the valid click
    assert not np.allclose(begun(one, 1)[ITEM], begun(third, 1)[ITEM], atol=1e-3)
    assert not np.allclose(begun(one, 1)[ITEM], first[ITEM], atol=1e-3)


def test_a_run_and_its_refit_begin_with_the_counts_of_their_own_clicks(fifty, tmp_path):
    options = ["model=gru4rec", "train.ppmi_start=2", "train.learning_rate=1e-9", "train.refit=true", "train.epochs=1"]
    assert main([f"data={fifty.path}", f"output={tmp_path / 'run'}", *SMALL, *options]) == 0
    for bundle, holdout in (("bundle-selected", 2), ("bundle", 1)):
        table = pq.read_table(tmp_path / "run" / bundle / "items.parquet")
        actual = np.stack(table["vector"].to_numpy(zero_copy_only=False))[:, :-1]
        expected = 2 * start_vectors(TrainSessions.of(fifty, holdout), actual.shape[1], 0)
        counted = expected.any(axis=1)
        assert counted.sum() > 50
        assert actual[counted] == pytest.approx(expected[counted], abs=1e-4)
        assert actual[~counted].any(axis=1).all()
