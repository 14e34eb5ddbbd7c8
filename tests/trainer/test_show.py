"""`trainer.show` against independently computed numbers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from retrieval.bundle import open_bundle
from trainer.__main__ import main as train
from trainer.show import main
from trainer.task.sessions import SessionTask

SMALL = ["network.embedding_dim=8", "network.hidden_size=8", "train.epochs=1", "train.batch_tokens=64", "ray.workers=0"]


@pytest.fixture(scope="module")
def hybrid(fifty, tmp_path_factory):
    run = tmp_path_factory.mktemp("show") / "run"
    assert train([f"data={fifty.path}", f"output={run}", "model=hybrid", *SMALL]) == 0
    return run


def test_show_prints_parts_gates_neighbours_and_recommendations(fifty, hybrid, capsys):
    bundle = open_bundle(hybrid / "bundle")
    queries = next(iter(bundle.queries("next")))
    user = int(queries.user_id[1])
    capsys.readouterr()
    assert main([f"run={hybrid}", "item=3", f"user={user}", "k=4"]) == 0
    out = capsys.readouterr().out
    summary = json.loads((hybrid / "summary.json").read_text())
    total = next(line for line in out.splitlines() if line.startswith("total"))
    parameters, flops = (int(word.replace(",", "")) for word in total.split()[1:])
    assert parameters == summary["parameters"]["total"]
    assert flops * 3 == summary["flops_per_example"]
    for task in summary["tasks"]:
        assert f"\n{task} " in out
    vectors = bundle.item_vectors()
    own = vectors[:, :-1] / np.linalg.norm(vectors[:, :-1], axis=1, keepdims=True)
    cosine = own @ own[2]
    cosine[2] = -2
    nearest = [int(i) + 1 for i in np.argsort(-cosine)[:4]]
    block = out.split("nearest to item 3 ")[1].splitlines()[1:5]
    assert [int(line.split()[1]) for line in block] == nearest
    score = queries.vector[1] @ vectors.T
    sessions = {r["user_id"]: r for f in fifty.session_files for r in pq.read_table(fifty.file(f.path)).to_pylist()}
    score[np.unique(sessions[user]["items"]) - 1] = -np.inf
    listed = [line.split() for line in out.split("next by score\n")[1].splitlines()]
    assert [int(words[1]) for words in listed] == [int(i) + 1 for i in np.argsort(-score)[:4]]
    assert [float(words[0]) for words in listed] == pytest.approx(sorted(score)[::-1][:4], abs=1e-3)


def test_recommendations_are_candidates(hybrid, capsys, monkeypatch):
    monkeypatch.setattr(SessionTask, "all_candidates", np.array([2, 7, 9]))
    assert main([f"run={hybrid}", "user=1"]) == 0
    listed = [int(line.split()[1]) for line in capsys.readouterr().out.split("next by score\n")[1].splitlines()]
    assert listed
    assert set(listed) <= {2, 7, 9}


def test_ranking_model_shows_no_recommendations(fifty, tmp_path, capsys):
    assert train([f"data={fifty.path}", f"output={tmp_path / 'run'}", "model=rank_ple", *SMALL]) == 0
    capsys.readouterr()
    assert main([f"run={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "user table" in out
    assert "nearest to item 1 " in out
    assert "next by score" not in out


@pytest.mark.parametrize(
    "wrong", [["run=/nowhere"], ["item=0"], ["item=100000"], ["user=999"], ["k=0"], ["data=/nowhere"], ["nosuch=1"]]
)
def test_invalid_options_fail_with_a_one_line_error(hybrid, wrong, capfd):
    assert main([f"run={hybrid}", *wrong]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert wrong[0].partition("=")[0] in err
    assert err.count("\n") == 1


SPOILED = {
    "no diagnostics": lambda run: (run / "diagnostics.json").unlink(),
    "diagnostics of another kind": lambda run: (run / "diagnostics.json").write_text("[]"),
    "another size": lambda run: edit_config(run, "embedding_dim: 8", "embedding_dim: 16"),
    "another model": lambda run: edit_config(run, "model: hybrid", "model: bert"),
    "a size that is no number": lambda run: edit_config(run, "hidden_size: 8", "hidden_size: abc"),
    "epochs that are no number": lambda run: edit_config(run, " epochs: 1", " epochs: two"),
    "an option of another version": lambda run: edit_config(run, "embedding_dim: 8", "embedding_dims: 8"),
    "no summary": lambda run: (run / "summary.json").write_text("null"),
}


def edit_config(run, old, new):
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


def test_damaged_runs_are_a_one_line_error(hybrid, tmp_path, capfd):
    for number, spoil in enumerate(SPOILED.values()):
        run = tmp_path / str(number)
        shutil.copytree(hybrid, run)
        spoil(run)
        assert main([f"run={run}", "item=1"]) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: expected ")
        assert err.count("\n") == 1
