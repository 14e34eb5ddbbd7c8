"""Ranking models from the command line: on the blocks of sessions and on the rows of scenario `ctr`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from etl.dataset import Dataset, open_dataset
from etl.logs.tenrec import HISTORY, VIDEO
from retrieval.bundle import open_bundle
from retrieval.config import load
from retrieval.evaluate import evaluate
from tests.support.runs import killed_at_step
from trainer.__main__ import main
from trainer.config import RANK_HEADS
from trainer.models.ranker import Ranker
from trainer.prepare import resolve_config, train_rates

SMALL = [
    "network.embedding_dim=8",
    "network.tower=8",
    "train.batch_tokens=64",
    "train.learning_rate=0.05",
    "train.network_learning_rate=0.02",
    "train.epochs=4",
    "train.valid_sessions=500",
    "train.checkpoint_steps=9",
    "ray.workers=0",
]


def run(dataset: Dataset, folder: Path, *more: str) -> Path:
    assert main([f"data={dataset.path}", f"output={folder}", *SMALL, *more]) == 0
    return folder


def result(dataset: Dataset, run: Path) -> dict:
    output = run.parent / f"{run.name}-result"
    return evaluate(load([f"bundle={run / 'bundle'}", f"data={dataset.path}", f"output={output}"]))


def ctr_dataset(folder: Path, *options: str) -> Dataset:
    """The rows of `folder`/log.csv."""
    import etl.config
    import etl.sessions

    etl.sessions.build(
        etl.config.load([f"input={folder / 'log.csv'}", f"output={folder / 'data'}", "scenario=ctr", *options])
    )
    return open_dataset(folder / "data")


@pytest.fixture(scope="module")
def ctr(tmp_path_factory) -> Dataset:
    """Rows that are mostly clicked if the category is even, and mostly liked if clicked and the age is above 3."""
    folder = tmp_path_factory.mktemp("ctr")
    rng = np.random.default_rng(0)
    lines = [",".join([*VIDEO, *HISTORY])]
    for _ in range(8_000):
        item, age = int(rng.integers(1, 60)), int(rng.integers(0, 8))
        click = int(rng.random() < (0.8 if item % 10 % 2 == 0 else 0.05))
        like = int(click and rng.random() < (0.7 if age > 3 else 0.02))
        values = (rng.integers(1, 40), item, click, 0, like, int(rng.random() < 0.1), item % 10, 0, 1, age)
        lines.append(",".join(map(str, [*values, *rng.integers(1, 60, len(HISTORY))])))
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return ctr_dataset(folder, "shards=3")


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("model", list(RANK_HEADS))
def test_every_ranking_model_learns_the_planted_dependence(ctr, tmp_path, model):
    folder = run(ctr, tmp_path / "run", f"model={model}", "tasks=[click,like]")
    actual = result(ctr, folder)["test"]
    assert actual["auc/click"] > 0.8
    assert actual["auc/like"] > 0.8
    assert actual["auc/like_given_click"] > 0.8
    assert "hr@20" not in actual
    rows = [r for f in ctr.row_files for r in pq.read_table(ctr.file(f.path)).to_pylist()]
    for split in ("valid", "test"):
        exported = open_bundle(folder / "bundle").feedback(split, "like").to_pylist()
        expected = Counter((r["user_id"], r["item"], r["like"]) for r in rows if r["split"] == split)
        assert Counter((r["user_id"], r["item"], r["label"]) for r in exported) == expected


def test_session_models_refuse_rows_and_a_refit_exports_no_valid_rows(ctr, tmp_path, capfd):
    assert main([f"data={ctr.path}", f"output={tmp_path / 'no'}", "model=hybrid", *SMALL]) == 2
    assert "error: expected a dataset of sessions, got rows of scenario ctr" in capfd.readouterr().err
    folder = run(ctr, tmp_path / "run", "model=rank_single", "tasks=[click]", "train.refit=true")
    kinds = {part for part in open_bundle(folder / "bundle").files_by_kind if "-" in part}
    assert kinds == {"feedback-test"}
    assert "feedback-valid" in open_bundle(folder / "bundle-selected").files_by_kind


@pytest.mark.parametrize("model", ["rank_esmm", "rank_ple"])
def test_ranking_models_train_on_session_blocks_and_resume_bit_identical(fifty, tmp_path, model):
    complete = run(fifty, tmp_path / "whole", f"model={model}")
    with killed_at_step(30):
        run(fifty, tmp_path / "cut", f"model={model}")
    cut = run(fifty, tmp_path / "cut", f"model={model}")
    bundles = [open_bundle(folder / "bundle") for folder in (complete, cut)]
    assert [f.sha256 for f in bundles[0].manifest.files] == [f.sha256 for f in bundles[1].manifest.files]
    assert not bundles[0].has_vectors
    sessions = [r for f in fifty.session_files for r in pq.read_table(fifty.file(f.path)).to_pylist()]
    shown = sum(p >= len(s["items"]) - 1 for s in sessions for p in s["exposure_position"])
    summary = json.loads((complete / "summary.json").read_text())
    assert [bundles[0].feedback("test", task).num_rows for task in summary["tasks"]] == [shown] * len(summary["tasks"])
    assert set(summary["parameters"]) == {"item", "user", "networks", "total"}
    assert result(fifty, complete)["test"]["rows/like"] == shown


def test_positive_rates_are_the_shares_among_train_rows(fifty, capfd):
    sessions = [r for f in fifty.session_files for r in pq.read_table(fifty.file(f.path)).to_pylist()]
    bits = [
        bits
        for s in sessions
        for position, bits in zip(s["exposure_position"], s["exposure_feedback"], strict=True)
        if 1 <= position <= len(s["items"]) - 3
    ]
    actual = train_rates(fifty, ["click", "like"], exposures=True)
    assert actual == {
        "click": sum(b >> 7 & 1 for b in bits) / len(bits),
        "like": sum(b & 1 for b in bits) / len(bits),
    }
    assert list(train_rates(fifty, ["click", "like"], exposures=False)) == ["like"]
    assert "task click is dropped: only one class" in capfd.readouterr().err


def test_initial_probabilities_of_rank_esmm_are_the_shares_of_its_own_labels(tmp_path):
    """Half of the likes are on unclicked rows: they are no positives of a model whose actions follow a click."""
    lines = [",".join([*VIDEO, *HISTORY])]
    for row in range(1_000):
        click, like = int(row % 10 < 3), int(row % 20 in (0, 5))
        lines.append(",".join(map(str, [row % 40 + 1, row % 7 + 1, click, 0, like, 0, 1, 1, 0, 3, *[0] * 10])))
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    dataset = ctr_dataset(tmp_path)
    line = [f"data={dataset.path}", f"output={tmp_path / 'run'}", "tasks=[click,like]", *SMALL]
    rows = [r for f in dataset.row_files for r in pq.read_table(dataset.file(f.path)).to_pylist()]
    train = [(r["click"], r["like"]) for r in rows if r["split"] == "train"]
    clicked, liked, both = (np.mean(column) for column in zip(*((c, k, c * k) for c, k in train), strict=True))
    assert both < 0.7 * liked
    for model, expected in {"rank_esmm": both, "rank_single": liked}.items():
        config, _ = resolve_config([*line, f"model={model}"])
        assert config.train.positive_rates == pytest.approx({"click": clicked, "like": expected})
        towers = Ranker(config, torch.zeros(10, dtype=torch.int64)).towers
        bias = {task: torch.sigmoid(tower[-1].bias).item() for task, tower in towers.items()}
        initial = bias["like"] * (bias["click"] if model == "rank_esmm" else 1.0)
        assert initial == pytest.approx(expected, rel=1e-5)


def test_passive_rows_are_clicked_without_another_action(fifty, tmp_path):
    expected = {"valid": 0, "test": 0}
    for entry in fifty.session_files:
        for row in pq.read_table(fifty.file(entry.path)).to_pylist():
            for split, back in (("valid", 2), ("test", 1)):
                rows = zip(row["exposure_position"], row["exposure_feedback"], strict=True)
                blocks = (len(row["items"]) - back, len(row["items"]) if split == "test" else -1)
                expected[split] += sum(bits == 1 << 7 for place, bits in rows if place in blocks)
    options = ["model=hybrid", "tasks=[next,click,passive]", *SMALL, f"output={tmp_path / 'run'}"]
    assert main([f"data={fifty.path}", *options]) == 0
    for split, passive in expected.items():
        table = pq.read_table(tmp_path / "run" / "bundle" / f"feedback-{split}").to_pandas()
        labels = {task: rows["label"].to_numpy() for task, rows in table.groupby("task", sort=False)}
        assert labels["passive"].sum() == passive > 3
        assert 0 < (labels["click"] > labels["passive"]).sum() == labels["click"].sum() - passive
    result = tmp_path / "result"
    options = [f"bundle={tmp_path / 'run' / 'bundle'}", f"data={fifty.path}", f"output={result}", "blend=none"]
    assert 0 <= evaluate(load([*options, "cutoffs=[5]"]))["test"]["auc/passive"] <= 1


def test_progress_counts_rows_and_ends_at_the_total(fifty, tmp_path, monkeypatch):
    """Rows are seen session by session: the total is extrapolated from the rows and sessions seen so far."""
    message = []

    def report(_, what, *values, **more):
        if what.startswith("epoch"):
            message.append(more)

    monkeypatch.setattr("trainer.run.progress_file.ProgressFile.write", report)
    run(fifty, tmp_path / "run", "model=rank_mmoe", "train.epochs=1")
    rows = sum(
        sum(1 <= p <= len(r["items"]) - 3 for p in r["exposure_position"])
        for f in fifty.session_files
        for r in pq.read_table(fifty.file(f.path)).to_pylist()
    )
    assert {each["unit"] for each in message} == {"rows"}
    assert message[-1]["done"] == message[-1]["total"] == rows
    assert all(each["done"] <= each["total"] <= 3 * rows for each in message)


def test_selection_by_an_undefined_auc_is_reported_and_keeps_the_first_epoch(tmp_path, capfd):
    """One row is liked, and the random split puts it into train."""
    lines = [",".join([*VIDEO, *HISTORY])]
    for row in range(400):
        like = int(row == 0)
        lines.append(",".join(map(str, [row % 20 + 1, row % 7 + 1, 1, 0, like, 0, 1, 1, 0, 3, *[0] * len(HISTORY)])))
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    dataset = ctr_dataset(
        tmp_path,
    )
    folder = run(dataset, tmp_path / "run", "model=rank_single", "tasks=[like]")
    assert "warning: auc is undefined" in capfd.readouterr().err
    assert json.loads((folder / "summary.json").read_text())["best_epoch"] == 1
