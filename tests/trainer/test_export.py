"""The exported encoder gives the queries of the bundle, in a process with torch and without our packages."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.mounts import small_disk
from tests.support.runs import SMALL
from trainer.__main__ import main as train
from trainer.data.batch import action_codes
from trainer.data.reader import Sessions, session_columns
from trainer.export import main

LOADER = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("etl", "trainer", "retrieval"):
            raise ImportError(name)

sys.meta_path.insert(0, Nothing())
import numpy as np, torch
batch = np.load(sys.argv[2])
encoder = torch.export.load(sys.argv[1]).module()
inputs = [torch.from_numpy(batch[name]) for name in ("items", "lengths", "profile", "actions")]
with torch.no_grad():
    found = [encoder(*(x[i : i + 7] for x in inputs)).numpy() for i in range(0, len(inputs[0]), 7)]
    np.save(sys.argv[3], np.concatenate(found))
"""


@pytest.mark.parametrize(
    "options",
    [
        ["model=gru4rec", "train.refit=true"],
        ["model=sasrec", "network.tie_embeddings=false"],
        [
            "model=hybrid",
            "network.past_actions=true",
            "network.profile=true",
            "network.item_features=[category]",
            "network.feedback_feature_dim=3",
        ],
    ],
    ids=lambda options: options[0],
)
def test_exported_encoder_reproduces_the_queries_of_the_bundle(fifty, tmp_path, options):
    run, output = tmp_path / "run", tmp_path / "export"
    assert train([f"data={fifty.path}", f"output={run}", *SMALL, *options]) == 0
    assert main([f"run={run}", f"output={output}"]) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    columns = session_columns(exposures=False, actions=True)
    table = pa.concat_tables(pq.read_table(fifty.file(e.path), columns=columns) for e in fifty.session_files)
    sessions, length = Sessions.of(table), manifest["length"]
    items = np.zeros((len(sessions), length), np.int64)
    for row, clicks in enumerate(table["items"].to_pylist()):
        items[row, : len(clicks)] = clicks
    lengths = sessions.items.lengths
    actions = action_codes(sessions, lengths, length)
    np.savez(tmp_path / "batch.npz", items=items, lengths=lengths, profile=sessions.profile, actions=actions)
    command = [sys.executable, "-c", LOADER, output / "encoder.pt2", tmp_path / "batch.npz", tmp_path / "query.npy"]
    subprocess.run([str(word) for word in command], check=True, cwd=tmp_path)
    bundle = pq.read_table(run / "bundle" / "queries-next").to_pylist()
    expected = {row["user_id"]: row["vector"] for row in bundle}
    query = np.load(tmp_path / "query.npy")
    assert query.shape == (len(expected), manifest["dimension"])
    assert query == pytest.approx(np.array([expected[user] for user in sessions.user_id.tolist()]), abs=1e-5)
    vectors = pq.read_table(output / "items.parquet")
    assert vectors["item_id"].to_pylist() == fifty.items(["item_id"])["item_id"].to_pylist()
    assert vectors["vector"].equals(pq.read_table(run / "bundle" / "items.parquet")["vector"])
    assert manifest["reads_actions"] == ("network.past_actions=true" in options)


def test_models_that_cannot_be_exported_are_refused(fifty, tmp_path, capfd):
    for model in ("srgnn", "rank_mmoe"):
        assert (
            train([f"data={fifty.path}", f"output={tmp_path / model}", *SMALL, f"model={model}", "train.epochs=1"]) == 0
        )
        capfd.readouterr()
        assert main([f"run={tmp_path / model}", f"output={tmp_path / 'export'}"]) == 2
        assert capfd.readouterr().err.startswith("error: expected ")
        assert not (tmp_path / "export").exists()


def test_export_to_a_full_disk_is_a_one_line_error(fifty, undisturbed, tmp_path):
    """In a process of its own: torch's writer of files would abort it."""
    with small_disk(tmp_path / "small", "20k") as small:
        command = [sys.executable, "-m", "trainer.export", f"run={undisturbed}", f"output={small / 'export'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: expected room on the disk")
        assert done.stderr.count("\n") == 1
        assert not (small / "export").exists()
