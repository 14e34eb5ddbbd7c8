"""Whole runs: resumed, refused, refitted, memorised, with and without Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import trainer.loop
import trainer.run.checkpoint
import trainer.run.signals
from etl.dataset import Dataset
from retrieval.bundle import open_bundle
from tests.support.engine import build, write_log
from trainer.__main__ import main
from trainer.config import MEDIUM_CATALOGUE, MODELS, SMALL_CATALOGUE, with_recipe
from trainer.run.checkpoint import TENSORS, latest

SMALL = [
    "network.embedding_dim=8",
    "network.hidden_size=8",
    "network.experts=2",
    "network.tower=8",
    "train.batch_tokens=64",
    "train.negatives=20",
    "train.valid_sessions=30",
    "ray.workers=0",
    "train.epochs=3",
    "train.checkpoint_steps=5",
]
"""A run of a second or two."""


def options(dataset, run: Path, *more: str) -> list[str]:
    return [f"data={dataset.path}", f"output={run}", "model=hybrid", *SMALL, *more]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(run / "checkpoints") / TENSORS)


def assert_same_run(a: Path, b: Path) -> None:
    left, right = final_tensors(a), final_tensors(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    bundles = [open_bundle(run / "bundle").manifest for run in (a, b)]
    assert [f.sha256 for f in bundles[0].files] == [f.sha256 for f in bundles[1].files]


@pytest.fixture(scope="module")
def undisturbed(fifty, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(options(fifty, run)) == 0
    return run


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


def test_the_first_step_without_ray_waits_for_no_ray_tensorboard_or_compiler(fifty, tmp_path):
    line = [sys.executable, "-c", FIRST_STEP, *options(fifty, tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 130  # as an interrupt ends
    (message,) = (text.split() for text in done.stdout.splitlines() if text.startswith("MODULES"))
    late = {"ray", "tensorboard", "matplotlib", "scipy", "torch._dynamo", "torch._inductor", "torch.utils.flop_counter"}
    assert not late & set(message)


def test_a_run_folder_holds_what_it_should(fifty, undisturbed):
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


def test_running_a_finished_run_again_changes_nothing(fifty, undisturbed, capfd):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.name != "config.yaml"}
    assert main(options(fifty, undisturbed)) == 0
    assert "already finished" in capfd.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.name != "config.yaml"} == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [3, 8, 26, 41])
def test_a_run_killed_at_any_step_ends_with_the_bits_of_an_undisturbed_one(
    fifty, undisturbed, tmp_path, at, monkeypatch
):
    taken = 0
    step = trainer.loop.TrainStep.step

    def killed(self, batch, number):
        nonlocal taken
        taken += 1
        if taken == at:
            raise Killed
        return step(self, batch, number)

    monkeypatch.setattr(trainer.loop.TrainStep, "step", killed)
    with pytest.raises(Killed):
        main(options(fifty, tmp_path / "run"))
    monkeypatch.undo()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(options(fifty, tmp_path / "run")) == 0
    assert_same_run(undisturbed, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["name"] == "ndcg@20"] == [1, 2, 3]


def test_sigterm_saves_and_the_same_command_goes_on(fifty, undisturbed, tmp_path, monkeypatch, capfd):
    step = trainer.loop.TrainStep.step

    def asked(self, batch, number):
        if number == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, number)

    monkeypatch.setattr(trainer.loop.TrainStep, "step", asked)
    monkeypatch.setattr(trainer.run.signals, "LOOK_SECONDS", 0.0)
    with pytest.raises(SystemExit) as left:
        main(options(fifty, tmp_path / "run", "train.checkpoint_steps=1000"))
    assert left.value.code == 143
    assert "stopped after step 16; the same command goes on from there\n" in capfd.readouterr().err
    assert latest(tmp_path / "run" / "checkpoints").name == "step-000000016"
    monkeypatch.undo()
    assert main(options(fifty, tmp_path / "run", "train.checkpoint_steps=1000")) == 0
    assert_same_run(undisturbed, tmp_path / "run")


def test_ctrl_c_says_so_and_exits_130_though_a_handler_would_leave_with_0(fifty, tmp_path, monkeypatch, capfd):
    def quiet(*given):
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as Ray's handler does
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    def interrupted(*given):
        with trainer.run.signals.interrupted_plainly():
            quiet()

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("trainer.launch.train", interrupted)
    with pytest.raises(SystemExit) as left:
        main(options(fifty, tmp_path / "run"))
    assert left.value.code == 130
    assert "interrupted; the same command goes on from the last checkpoint\n" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_truncated_checkpoint_is_named_and_the_one_before_taken(fifty, undisturbed, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for name in ("summary.json", "bundle"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = latest(run / "checkpoints")
    data = (newest / TENSORS).read_bytes()
    (newest / TENSORS).write_bytes(data[: len(data) // 2])
    assert main(options(fifty, run)) == 0
    assert f"checkpoint {newest.name} is broken" in capfd.readouterr().err
    assert_same_run(undisturbed, run)


def test_a_profiled_run_writes_a_trace_and_a_table(fifty, tmp_path):
    assert main(options(fifty, tmp_path / "run", "train.profile=true", "train.epochs=1")) == 0
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert "aten::addmm" in table
    assert json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())["traceEvents"]


def test_more_epochs_continue_a_finished_run_and_equal_one_that_had_them_at_once(fifty, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "a")
    assert main(options(fifty, tmp_path / "a", "train.epochs=4")) == 0
    assert main(options(fifty, tmp_path / "b", "train.epochs=4")) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_refit_bundle_holds_no_valid_part_and_another_model(fifty, tmp_path):
    run = tmp_path / "run"
    assert main(options(fifty, run, "train.refit=true", "train.epochs=2")) == 0
    bundle, selected = open_bundle(run / "bundle"), open_bundle(run / "bundle-selected")
    assert bundle.manifest.refit
    assert not selected.manifest.refit
    assert {part.split("-")[1] for part in bundle.parts if "-" in part} == {"test", "next"}
    assert selected.n_queries("valid") == 50
    assert not np.array_equal(bundle.item_vectors(), selected.item_vectors())
    curves = json.loads((run / "diagnostics.json").read_text())["curves"]
    assert [epoch for epoch, _ in curves["valid/ndcg@20"]] == [1, 2]


def test_the_test_click_changes_neither_training_nor_the_test_query(tmp_path):
    """Two logs that differ in every user's last click: one run's bits in the other."""
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


@pytest.mark.parametrize(
    "wrong",
    [
        ["train.learning_rate=0.3"],
        ["seed=7"],
        ["tasks=[next]"],
        ["resume=never"],
        ["network.experts=4"],
    ],
)
def test_a_run_refuses_to_go_on_otherwise_than_it_began(fifty, undisturbed, wrong, capfd):
    assert main([*options(fifty, undisturbed), *wrong]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1


def test_a_run_refuses_another_dataset(undisturbed, tmp_path, capfd):
    rows = [(u, 1 + (u + i) % 12, 1, 0, i % 2, 0, "c", 1, 1, 1) for u in range(1, 9) for i in range(14)]
    other = build(
        [
            f"input={write_log(tmp_path / 'log.csv', rows)}",
            f"output={tmp_path / 'data'}",
            "scenario=qb_video",
            "shards=1",
        ]
    )
    assert main(options(other, undisturbed)) == 2
    assert "error: expected dataset=" in capfd.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["model=bert"],
        ["loss=magic"],
        ["ray.workers=9999"],
        ["ray.workers=-1"],
        ["ray.workers=two"],
        ["ray.workers=automatic"],
        ["ray.workers=[2,1]"],
        ["ray.workers=[0,1]"],
        ["train.precision=bfloat16"],
        ["train.gradient_accumulation_steps=0"],
        ["train.epochs=none"],
        ["tasks=[click]"],
        ["tasks=[next,next]"],
        ["network.hidden_size=0"],
        ["seed=-1"],
        ["train.negative_popularity_exponent=nan"],
        ["train.negative_popularity_exponent=1000"],
        ["train.positive_rates={like: 5}"],
        ["seed=9223372036854775808"],
        ["seed=1180591620717411303424"],
        ["train.learning_rate=-1"],
        ["data=/nowhere"],
        ["nosuch=1"],
        ["train"],
        ["train.task_weights={jump: 1}"],
        ["encoder=cnn"],
        ["recipe=huge"],
        ["encoder=[gru4rec,gru4rec]"],
        ["encoder=[]"],
        ["encoder=sasrec", "network.attention_heads=3"],
        ["network.positions=2"],
        ["train.select_by=auc/dislike"],
        ["train.gbce_t=2"],
        ["train.max_grad_norm=-1"],
        ["train.optimizer=sgd"],
        ["model=rank_esmm", "tasks=[like]"],
        ["model=rank_mmoe", "tasks=[next]"],
    ],
)
def test_wrong_options_end_with_one_plain_line_and_nothing_written(fifty, tmp_path, wrong, capfd):
    assert main([*options(fifty, tmp_path / "run"), *wrong]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: expected "), err
    assert err.count("\n") == 1
    assert ", got " in err
    assert wrong[-1].partition("=")[0] in err
    assert not (tmp_path / "run").exists()
    assert out == ""


@pytest.mark.parametrize(
    "given",
    [
        ["train.task_weights={like: 0.5,click: 2}", "train.positive_rates={share: 0.25}"],
        ["train.task_weights.like=0.5", "train.task_weights.click=2", "train.positive_rates.share=0.25"],
    ],
)
@pytest.mark.parametrize(("model", "recipes"), [("gru4rec", {}), ("hybrid", {"share": 0.3, "follow": 0.3})])
def test_values_by_task_are_read_whole_or_one_by_one(model, recipes, given):
    train = with_recipe(["data=d", "output=o", f"model={model}", *given], n_items=10).train
    assert train.task_weights == {"like": 0.5, "click": 2.0} | recipes
    assert train.positive_rates == {"share": 0.25}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("train.task_weights={jump: 1}", "expected train.task_weights of next, click, like, share, follow, got jump"),
        ("train.task_weights.like=-1", "expected train.task_weights.like of at least 0, got -1.0"),
        ("train.positive_rates.like=often", "expected a number for train.positive_rates.like, got 'often'"),
    ],
)
def test_values_by_task_that_make_no_sense_are_named(fifty, tmp_path, wrong, message, capfd):
    assert main([*options(fifty, tmp_path / "run"), wrong]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("model", MODELS)
def test_a_recipe_is_named_on_the_command_line_or_follows_from_the_catalogue(model):
    line = ["data=d", "output=o", f"model={model}"]
    sizes = ("small", "medium", "large")
    small, medium, large = (with_recipe([*line, f"recipe={size}"], n_items=10) for size in sizes)
    assert (small.recipe, medium.recipe, large.recipe) == sizes
    assert small.train.batch_tokens <= medium.train.batch_tokens < large.train.batch_tokens
    assert with_recipe(line, n_items=SMALL_CATALOGUE) == small
    assert with_recipe(line, n_items=SMALL_CATALOGUE + 1) == with_recipe(line, n_items=MEDIUM_CATALOGUE) == medium
    assert with_recipe(line, n_items=MEDIUM_CATALOGUE + 1) == large
    assert with_recipe([*line, "recipe=large", "train.batch_tokens=7"], n_items=10).train.batch_tokens == 7


def test_missing_options_and_foreign_folders_are_refused(fifty, tmp_path, capfd):
    assert main([f"data={fifty.path}", "model=gru4rec"]) == 2
    assert "error: expected option output=" in capfd.readouterr().err
    (tmp_path / "file").touch()
    for output, words in ((fifty.path / "run", "outside the dataset"), (tmp_path / "file" / "run", "error: expected ")):
        assert main(options(fifty, output)) == 2
        assert words in capfd.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose me")
    assert main(options(fifty, tmp_path / "mine")) == 2
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def dataset_of(folder: Path, sessions: list[list[int]]) -> Dataset:
    rows = [(user, item, 1, 0, 0, 0, "c", 1, 1, 1) for user, items in enumerate(sessions, 1) for item in items]
    log = write_log(folder / "log.csv", rows)
    arguments = ["scenario=qb_video", "shards=1", "protocol.min_clicks=3"]
    return build([f"input={log}", f"output={folder / 'data'}", *arguments])


@pytest.mark.parametrize(
    ("sessions", "model", "words"),
    [
        ([[7] * 6] * 5, "gru4rec", "expected a dataset of at least 2 items, got 1"),
        (
            [[i, i + 1, i + 2] for i in range(20)],
            "gru4rec",
            "a session of at least 4 kept clicks to train on, got at most 3",
        ),
        ([[i, i + 1, i + 2] for i in range(20)], "rank_mmoe", "a session of at least 4 kept clicks"),
    ],
)
def test_a_log_without_anything_to_learn_from_is_refused_in_plain_words(tmp_path, sessions, model, words, capfd):
    dataset = dataset_of(tmp_path, sessions)
    assert main([f"data={dataset.path}", f"output={tmp_path / 'run'}", f"model={model}", *SMALL]) == 2
    out, err = capfd.readouterr()
    assert words in err
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "run").exists()


def test_one_session_is_learned_by_the_largest_seed_and_dropped_tasks_are_told_on_stderr(tmp_path, capfd):
    dataset = dataset_of(tmp_path, [[1, 2, 3, 4, 5, 6]])
    arguments = [f"data={dataset.path}", f"output={tmp_path / 'run'}", "model=hybrid", *SMALL, "recipe=small"]
    assert main([*arguments, f"seed={2**63 - 1}", "train.epochs=1"]) == 0
    out, err = capfd.readouterr()
    assert "warning: task like is dropped: only one class in train" in err
    assert "warning" not in out


def test_a_dataset_without_sessions_is_refused(fifty, tmp_path, capfd):
    shutil.copytree(fifty.path, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"counts": manifest["counts"] | {"sessions": 0}}))
    assert main([f"data={tmp_path / 'data'}", f"output={tmp_path / 'run'}", "model=hybrid", *SMALL]) == 2
    assert "error: expected a dataset with sessions, got none" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["model=sasrec"], 0),
        (["model=sasrec", "network.hidden_size=256"], 100),
        (["model=gru4rec"], 100),  # by its recipe
        (["model=gru4rec", "recipe=medium"], 0),
        (["model=gru4rec", "recipe=medium", "network.hidden_size=256"], 100),
        (["model=hybrid", "network.embedding_dim=512"], 100),
        (["model=hybrid", "network.embedding_dim=512", "train.warmup_steps=0"], 0),
        (["model=rank_mmoe", "network.embedding_dim=512"], 0),
    ],
)
def test_wide_session_models_warm_up_unless_told_otherwise(options, steps):
    assert with_recipe(["data=d", "output=o", *options], 1_000).train.warmup_steps == steps
