"""What a run will take, worked out from steps measured here."""

from __future__ import annotations

import json

import pytest

from tests.support.runs import SMALL
from tests.support.workers import run_workers
from trainer.__main__ import main as train
from trainer.plan import main
from trainer.step_cost import Measured, exchanged

GIVEN = [o for o in SMALL if not o.startswith("ray.")]


@pytest.mark.cluster
@pytest.mark.parametrize("model", ["gru4rec", "hybrid", "rank_mmoe"])
def test_a_plan_names_the_steps_and_parameters_that_the_run_then_has(fifty, tmp_path, model, capfd, monkeypatch):
    monkeypatch.setattr("trainer.step_cost.spawn", run_workers)
    line = [f"data={fifty.path}", f"model={model}", *GIVEN, "train.epochs=1"]
    assert main([*line, "workers=2", "measured_steps=3"]) == 0
    message = dict(text.rsplit("  ", 1) for text in capfd.readouterr().out.splitlines() if "  " in text)
    message = {name.strip(): value.strip() for name, value in message.items()}
    assert train([*line, f"output={tmp_path / 'run'}", "ray.workers=0"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert message["parameters"] == f"{summary['parameters']['total']:,}"
    # Windows end with a smaller step, so that an epoch has a few more than targets / batch_tokens.
    assert int(message["steps an epoch"]) <= summary["steps"] <= int(message["steps an epoch"]) + 2
    assert int(message["events/s, all workers"].replace(",", "")) > 0
    seconds = sum(map(float, message["seconds a step: measured + network"].split(" + ")))
    hours = int(message["steps an epoch"].replace(",", "")) * seconds / 3600
    assert float(message["hours an epoch"]) == pytest.approx(hours, abs=0.01)


def test_what_workers_exchange_by_hand():
    actual = Measured(seconds=1, targets=1, rows=100, row_bytes=268, dense_bytes=4_000, resident=0)
    assert exchanged(actual, 1) == 0
    assert exchanged(actual, 4) == 3 * 100 * 268 + 2 * 4_000 * 3 / 4


@pytest.mark.parametrize("wrong", ["workers=0", "workers=many", "network_gbit=-1", "model=bert", "no_such=1"])
def test_wrong_options_end_with_one_plain_line(fifty, wrong, capfd):
    assert main([f"data={fifty.path}", "model=gru4rec", wrong]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1
