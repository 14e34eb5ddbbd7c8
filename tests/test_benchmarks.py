"""Arithmetic used only by the benchmarks."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from etl.twin.rows import rows_of
from etl.twin.simulate import make_twin
from tests.benchmarks import gpu
from tests.benchmarks.expected import Truth, expected_auc
from tests.benchmarks.reading import Window


@pytest.mark.parametrize("levels", [3, 1_000])
def test_expected_auc_equals_the_mean_over_all_pairs(levels):
    rng = np.random.default_rng(levels)
    score, chance = rng.integers(0, levels, 60) / levels, rng.random(60)
    right = pairs = 0.0
    for i in range(60):
        for j in range(60):
            if i != j:
                weight = chance[i] * (1 - chance[j])
                pairs += weight
                right += weight * ((score[i] > score[j]) + (score[i] == score[j]) / 2)
    assert expected_auc(score, chance) == pytest.approx(right / pairs, abs=1e-12)


def test_expected_auc_with_certain_labels_equals_roc_auc():
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 50, 500), rng.random(500) < 0.1
    assert expected_auc(score, label.astype(float)) == pytest.approx(roc_auc_score(label, score), abs=1e-12)


def test_true_probabilities_match_the_labels_drawn_from_them():
    twin = make_twin("qk_video", users=20_000, items=4_000, seed=3)
    truth = Truth.of(twin)
    table = rows_of(twin, 0, truth.clicks)
    length = np.diff(truth.clicks.offset)[table["user"]]
    block = (table["position"] >= length - 1) & np.isin(table["user"], truth.users)
    clicked = table["click"][block] == 1
    label, chance = table["like"][block], truth.chance("like", table["user"][block], table["rank"][block], clicked)
    for rows in (clicked, ~clicked):
        assert abs(label[rows].sum() - chance[rows].sum()) < 4 * np.sqrt((chance[rows] * (1 - chance[rows])).sum())
        # The AUC of the probabilities on the labels is the expected one; shifted by one row it is 0.5.
        assert roc_auc_score(label[rows], chance[rows]) == pytest.approx(
            expected_auc(chance[rows], chance[rows]), abs=0.02
        )
        assert roc_auc_score(label[rows], np.roll(chance[rows], 1)) == pytest.approx(0.5, abs=0.03)


def test_best_possible_auc_is_above_chance_and_below_that_of_hidden_probabilities():
    twin = make_twin("qb_video", users=3_000, items=4_000, task_correlation=1.0, seed=1)
    truth = Truth.of(twin)
    best, last = truth.best(), truth.clicks.offset[truth.users + 1] - 1
    for task in ("like", "share", "follow"):
        chance = truth.chance(task, truth.users, truth.clicks.rank[last], np.ones(len(last), bool))
        assert 0.6 < best[f"{task} | given click"] < expected_auc(chance, chance)


def test_gpu_benchmark_without_a_gpu_measures_the_cpu_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "matrix_peak", lambda device, precision: 4e12)
    monkeypatch.setattr(gpu, "events_per_second", lambda model, *_: (10.0, 1e12) if model == "hybrid" else (40.0, 2e12))
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        gpu.gpu()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("no GPU")
    assert [line.split(" | ")[3:] for line in lines[5:]] == [
        ["gru4rec", "40", "2.000", "4.00", "50.0%", "1.0 × |"],
        ["hybrid", "10", "1.000", "4.00", "25.0%", "1.0 × |"],
    ]


def test_decode_share_of_a_step_matches_hand_computation():
    """A window of 20 ms in ten steps is 2 ms a step; 64 workers wait for 8 × 63 messages."""
    window = Window(groups=2, sessions=900, steps=10, decode=0.02, cut=0.01, step={1: 0.095, 64: 0.005})
    assert window.decode_share(64) == pytest.approx(2 / (2 + 1 + 5))
    assert window.decode_share(64, latency=1e-4) == pytest.approx(2 / (2 + 1 + 5 + 50.4))
    # On one worker all but decoding takes 96 ms; on this many it takes 38 ms, 19 times the 2 ms of decoding.
    assert window.earliest() == pytest.approx(96 / 38)
