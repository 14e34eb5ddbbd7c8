"""Resource estimates of a run, from steps measured on this machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.support.runs import SMALL
from tests.support.workers import run_workers
from tests.trainer.test_step import config
from trainer.__main__ import main as train
from trainer.distributed.world import World
from trainer.memory_plan import MemoryPlan
from trainer.plan import main
from trainer.step_cost import StepModel, efficient_batch, messages, received_bytes, sharded_bytes
from trainer.step_measurement import Link, Measured
from trainer.task.registry import model_task_of

GIVEN = [o for o in SMALL if not o.startswith("ray.")]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("model", "more"),
    [("gru4rec", ["train.table=sharded", "train.ppmi_start=0"]), ("hybrid", []), ("rank_mmoe", [])],
)
def test_plan_gives_the_steps_and_parameters_of_the_actual_run(fifty, tmp_path, model, more, capfd, monkeypatch):
    monkeypatch.setattr("trainer.step_measurement.spawn", run_workers)
    line = [f"data={fifty.path}", f"model={model}", *GIVEN, "train.epochs=1", *more]
    assert main([*line, "workers=2", "measured_steps=3"]) == 0
    lines = capfd.readouterr().out.splitlines()
    message = dict(text.rsplit("  ", 1) for text in lines if "  " in text)
    message = {name.strip(): value.strip() for name, value in message.items()}
    rows = [text.replace(",", "").split() for text in lines if text[:7].strip().isdigit()]
    assert train([*line, f"output={tmp_path / 'run'}", "ray.workers=0"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert message["parameters"] == f"{summary['parameters']['total']:,}"
    # Windows end with a smaller step, so an epoch has slightly more steps than targets / batch_tokens.
    assert int(message["steps an epoch"]) <= summary["steps"] <= int(message["steps an epoch"]) + 2
    assert [int(row[0]) for row in rows] == [1, 2, 8, 64, 512]
    assert ("… while it counts co-occurrence" in message) == (model == "hybrid")  # by its recipe
    for row in rows:
        *parts, seconds = map(float, row[1:6])
        assert sum(parts) == pytest.approx(seconds, abs=3e-4)
        assert float(row[10]) > 0
        assert float(row[9]) == pytest.approx(int(message["steps an epoch"]) * seconds / 3600, abs=0.001)


SMALL_STEP = Measured(
    seconds=0.010,
    targets=100,
    own_rows=100,
    shared_rows=50,
    row_bytes=260,
    state_bytes=268,
    sum_seconds=1e-6,
    put_seconds=2e-6,
    take_seconds=3e-6,
    draw_seconds=1e-9,
    dense_bytes=4_000,
    resident=0,
)
MODEL = StepModel(SMALL_STEP, replace(SMALL_STEP, seconds=0.046, targets=400, own_rows=200))


def test_received_bytes_and_messages_match_hand_computation():
    """Each of four workers receives 3/4 of its rows' ids and gradients, of all rows' states, of the ring all-reduce."""
    gradients, states = 70 * 264 + 50 * 260, 180 * 272
    assert received_bytes(SMALL_STEP, 70, 180, 4) == 0.75 * (gradients + states + 2 * 4_000)
    assert (messages(2), messages(64)) == (8, 8 * 63)


def test_received_bytes_with_a_sharded_table_match_hand_computation():
    """Ids once, rows to their readers, gradients back to the owners; no states of updated rows."""
    assert sharded_bytes(SMALL_STEP, 70, 4) == 0.75 * (70 * 4 + (70 + 50) * 260 + (70 + 50) * 260 + 2 * 4_000)
    link, sharded = Link(1e-4, 1e6), replace(MODEL, sharded=True)
    cost = sharded.cost(1600, 4, link)
    assert cost.merge == pytest.approx((200 + 50) * (1e-6 + 3e-6))
    assert cost.network == pytest.approx(sharded_bytes(SMALL_STEP, 200, 4) / 1e6)
    assert cost.latency == MODEL.cost(1600, 4, link).latency


def test_memory_of_a_sharded_table_matches_hand_computation(fifty):
    """Rows are split among workers, counts of all items are not: clicks in 4 bytes, a cumulative share in 8."""
    settings = config(fifty.path, model="gru4rec", tasks=["next"], train={"table": "sharded"})
    train_step, n = model_task_of(settings, fifty, World.alone()).train_step(1), fifty.manifest.n_items
    networks = sum(p.numel() for p in train_step.model.parameters())
    plan = MemoryPlan.of(settings, train_step, 10**9, n)
    assert plan.bytes(n, 1) == pytest.approx(10**9)
    rest = 10**9 - (n + 1) * 4 * (8 + 1 + 2) - 12 * n - 4 * networks * 3
    items = 1_000_000
    expected = (items + 1) * 4 * (8 + 1 + 2) / 64 + 12 * items + 4 * networks * 3 + rest
    assert plan.bytes(items, 64) == pytest.approx(expected)
    replicated = replace(plan, sharded=False)
    assert replicated.bytes(items, 64) - expected == pytest.approx(63 / 64 * (items + 1) * 4 * (8 + 1 + 2))
    lines = dict(plan.lines(items, 64, 1e-6))
    assert lines["drawing the first vectors, on each worker"] == "8 s"
    assert lines["a worker's file of a checkpoint"] == "1 MiB"


def test_step_cost_fitted_to_two_sizes_matches_hand_computation():
    """Compute: 0.12 ms per target minus 2 ms; rows: four times the targets have twice the rows."""
    assert MODEL.compute(100) == pytest.approx(0.010)
    assert MODEL.compute(1600) == pytest.approx(0.046 + 1200 * 0.00012)
    assert MODEL.own_rows(1600) == pytest.approx(400)
    cost = MODEL.cost(1600, 4, Link(1e-4, 1e6))
    assert cost.compute == pytest.approx(0.046)
    assert cost.merge == pytest.approx((200 + 50) * 1e-6 + (400 + 50) * 2e-6)
    assert cost.network == pytest.approx(received_bytes(SMALL_STEP, 200, 450, 4) / 1e6)
    assert cost.latency == pytest.approx(24e-4)
    expected = MODEL.compute(1600) / (4 * (cost.compute + cost.merge + cost.network + cost.latency))
    assert MODEL.efficiency(1600, 4, Link(1e-4, 1e6)) == pytest.approx(expected)
    assert MODEL.efficiency(1600, 1, Link(1e-4, 1e6)) == 1.0


def test_efficient_batch_is_the_smallest_with_sufficient_efficiency():
    fast = Link(1e-6, 1e12)
    text = efficient_batch(MODEL, 400, 64, fast)
    tokens = batch_of(text)
    assert MODEL.efficiency(tokens, 64, fast) >= 0.6 > MODEL.efficiency(tokens / 2, 64, fast)
    assert "at most" in efficient_batch(MODEL, 400, 64, Link(10.0, 1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        *("workers=0", "workers=many", "workers=1.5", "network_gbit=-1", "network_gbit=nan", "latency_us=0"),
        *("cores=0", "measured_steps=0", "items=-1", "model=bert", "no_such=1"),
    ],
)
def test_invalid_options_fail_with_a_one_line_error(fifty, wrong, capfd):
    assert main([f"data={fifty.path}", "model=gru4rec", wrong]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1


def test_own_options_arrive_typed_and_the_others_at_the_trainer(fifty, capfd, monkeypatch):
    plans = []
    monkeypatch.setattr("trainer.step_cost.plan", lambda *configs: plans.append(configs) or ["planned"])
    own = ["workers=64", "items=0", "network_gbit=2.5", "latency_us=30", "cores=2", "measured_steps=7"]
    assert main([f"data={fifty.path}", "model=gru4rec", "train.batch_tokens=64", "ray.workers=2", *own]) == 0
    assert capfd.readouterr().out == "planned\n"
    (plan, config), *_ = plans
    assert (plan.workers, plan.items, plan.network_gbit, plan.latency_us) == (64, 0, 2.5, 30.0)
    assert (plan.cores, plan.measured_steps, plan.output) == (2, 7, "plan")
    assert (config.train.batch_tokens, config.ray.workers) == (64, 0)
    assert main([f"data={fifty.path}", "model=gru4rec"]) == 0
    assert (plans[1][0].workers, plans[1][0].network_gbit) == (8, 10.0)


def test_log_whose_steps_have_one_size_is_refused(fifty, capfd, monkeypatch):
    measured = [replace(SMALL_STEP, targets=400.0)], Link(1e-4, 1e6)
    monkeypatch.setattr("trainer.step_cost.measure", lambda *_, **__: measured)
    assert main([f"data={fifty.path}", "model=gru4rec"]) == 2
    assert "a dataset with larger steps, to measure two sizes, got 400" in capfd.readouterr().err


def test_efficient_batch_of_a_ranking_model_counts_its_rows():
    """With four rows a click, a batch of a quarter of the clicks has the same rows."""
    fast = Link(1e-6, 1e12)
    of_rows, of_clicks = (batch_of(efficient_batch(MODEL, n, 64, fast, per_click=1600 / n)) for n in (1600, 400))
    assert of_rows == 4 * of_clicks


def batch_of(text: str) -> int:
    return int(text.rpartition(" target")[0].rpartition(" ")[2].replace(",", ""))
