"""Complete runs: content of the run folder, refit, no influence of test clicks."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import trainer.training.step
from retrieval.bundle import open_bundle
from tests.support.engine import build, write_log
from tests.support.runs import final_tensors, options
from trainer.__main__ import main
from trainer.inference.validation import Validation
from trainer.run.metrics_log import read_metrics
from trainer.training.step import learning_rate_factor

FIRST_STEP = """
import sys
from trainer.training.step import TrainStep
from trainer.__main__ import main

def step(self, parts, number):
    print("MODULES", *sorted(sys.modules))
    raise KeyboardInterrupt

TrainStep.step = step
sys.exit(main(sys.argv[1:]))
"""


def test_first_step_without_ray_imports_no_ray_tensorboard_or_compiler(fifty, tmp_path):
    line = [sys.executable, "-c", FIRST_STEP, *options(fifty, tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 130  # exit status of an interrupt
    (message,) = (text.split() for text in done.stdout.splitlines() if text.startswith("MODULES"))
    late = {"ray", "tensorboard", "matplotlib", "scipy", "torch._dynamo", "torch._inductor", "torch.utils.flop_counter"}
    assert not late & set(message)


def test_run_folder_has_summary_metrics_diagnostics_and_bundle(fifty, undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["tasks"] == ["next", "click", "like", "share", "follow"]
    assert summary["parameters"]["item"] == (fifty.manifest.n_items + 1) * 9
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert all(line.keys() == {"step", "epoch", "split", "name", "value"} for line in lines)
    curve = {line["epoch"]: line["value"] for line in lines if line["name"] == "ndcg@20"}
    assert list(curve) == [1, 2, 3]
    best = summary["best_epoch"]
    assert best == max(curve, key=curve.get)
    assert summary["valid"] == {x["name"]: x["value"] for x in lines if (x["split"], x["epoch"]) == ("valid", best)}
    gates = json.loads((undisturbed / "diagnostics.json").read_text())["gates"]
    for weights in gates["mean_weight"].values():
        assert sum(weights) == pytest.approx(1.0)
    assert all(0 <= entropy <= np.log(2) + 1e-9 for entropy in gates["entropy_nats"].values())
    assert list((undisturbed / "tensorboard").iterdir())
    bundle = open_bundle(undisturbed / "bundle", dataset=fifty.manifest.fingerprint)
    assert bundle.n_queries("valid") == bundle.n_queries("test") == bundle.n_queries("next") == 50
    query = next(iter(bundle.queries("test")))
    sessions = {r["user_id"]: r for f in fifty.session_files for r in pq.read_table(fifty.file(f.path)).to_pylist()}
    for i, user in enumerate(query.user_id.tolist()):
        session = sessions[user]
        assert query.target[i] == session["items"][-1]
        assert query.seen[query.seen_offset[i] : query.seen_offset[i + 1]].tolist() == session["items"][:-1]
    feedback = {task: bundle.feedback("test", task).to_pylist() for task in bundle.feedback_tasks("test")}
    block = [r for s in sessions.values() for r in s["exposure_position"] if r >= len(s["items"]) - 1]
    assert {task: len(rows) for task, rows in feedback.items()} == dict.fromkeys(summary["tasks"][1:], len(block))
    assert {r["label"] for r in feedback["click"] if r["clicked"]} == {1}


def test_profiled_run_writes_a_trace_and_a_table(fifty, tmp_path):
    assert main(options(fifty, tmp_path / "run", "train.profile=true", "train.epochs=1")) == 0
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert "aten::addmm" in table
    assert json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())["traceEvents"]


def test_refit_bundle_has_no_valid_part_and_other_parameters(fifty, tmp_path):
    run = tmp_path / "run"
    assert main(options(fifty, run, "train.refit=true", "train.epochs=2")) == 0
    bundle, selected = open_bundle(run / "bundle"), open_bundle(run / "bundle-selected")
    assert bundle.manifest.refit
    assert not selected.manifest.refit
    assert {part.split("-")[1] for part in bundle.files_by_kind if "-" in part} == {"test", "next"}
    assert selected.n_queries("valid") == 50
    assert not np.array_equal(bundle.item_vectors(), selected.item_vectors())
    curves = json.loads((run / "diagnostics.json").read_text())["curves"]
    assert [epoch for epoch, _ in curves["valid/ndcg@20"]] == [1, 2]


def test_test_clicks_change_neither_training_nor_test_queries(tmp_path):
    """Two logs that differ only in every user's last click give bit-identical parameters."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 25, rng.integers(10, 20)).tolist() for _ in range(40)]
    everything = list(range(1, 25)) * 3  # a user with every item, so that the catalogue stays the same
    runs = []
    for name, last in (("a", 0), ("b", 1)):
        rows = []
        for user, items in enumerate([*sequences, everything], 1):
            clicked = items if user > len(sequences) else [*items[:-1], (items[-1] + last) % 24 + 1]
            rows += [(user, item, 1, 0, item % 2, 0, "c", 1, 1, 1) for item in clicked]
        log = write_log(tmp_path / f"{name}.csv", rows)
        dataset = build([f"input={log}", f"output={tmp_path / name}", "scenario=qb_video", "shards=2"])
        # The order of sessions follows from the dataset's fingerprint: give both the same.
        manifest = json.loads((dataset.path / "manifest.json").read_text())
        manifest["fingerprint"] = "ab" * 32
        (dataset.path / "manifest.json").write_text(json.dumps(manifest))
        assert main(options(dataset, tmp_path / f"run-{name}")) == 0
        runs.append(tmp_path / f"run-{name}")
    for name, tensor in final_tensors(runs[0]).items():
        assert torch.equal(tensor, final_tensors(runs[1])[name]), name
    queries = [[(q.vector, q.seen, q.target) for q in open_bundle(r / "bundle").queries("test")] for r in runs]
    assert not all(np.array_equal(a[2], b[2]) for a, b in zip(*queries, strict=True))
    for a, b in zip(*queries, strict=True):
        assert np.array_equal(a[0], b[0])
        assert np.array_equal(a[1], b[1])


def test_patience_counts_epochs_since_the_best_one(fifty, tmp_path, monkeypatch):
    """Valid scores of six epochs: the two after the fourth are worse."""
    scores = iter((0.1, 0.2, 0.1, 0.3, 0.2, 0.2, 0.9))
    monkeypatch.setattr(
        "trainer.task.sessions.validate_sessions", lambda *_, **__: Validation({"ndcg@20": next(scores, 0.3)})
    )
    assert main(options(fifty, tmp_path / "run", "train.epochs=9", "train.early_stopping_patience=2")) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["value"] for line in lines if line["split"] == "valid"] == [0.1, 0.2, 0.1, 0.3, 0.2, 0.2]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_epoch"] == 4


@pytest.mark.parametrize("model", ["model=gru4rec", "model=rank_mmoe"])
def test_cosine_schedule_ends_with_the_last_step(fifty, tmp_path, model, monkeypatch):
    """Batches end with a shuffle buffer, so an epoch has more steps than targets / batch_tokens."""
    factors = []
    monkeypatch.setattr(
        trainer.training.step, "learning_rate_factor", lambda *at: factors.append(learning_rate_factor(*at)) or 1.0
    )
    more = (
        "train.schedule=cosine",
        "train.shuffle_buffer_sessions=8",
        "train.batch_tokens=60",
        "train.warmup_steps=0",
        model,
    )
    assert main(options(fifty, tmp_path / "run", *more)) == 0
    steps = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert factors == pytest.approx([(1 + np.cos(np.pi * step / steps)) / 2 for step in range(steps)])
