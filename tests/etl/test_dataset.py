"""`open_dataset` on the frozen tiny dataset and on damaged copies."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from etl.dataset import open_dataset
from etl.runtime.errors import InputError


def test_the_frozen_dataset_opens(tiny):
    dataset = open_dataset(tiny / "data")
    assert dataset.manifest.counts == {"sessions": 12, "items": 6, "clicks": 60, "exposures": 12 * 9, "rows_read": 120}
    assert dataset.manifest.max_clicks == 30
    rows = {r["user_id"]: r for f in dataset.session_files for r in pq.read_table(dataset.file(f.path)).to_pylist()}
    # User 1 clicked A B C D E and was shown F after each click; what came after E is dropped.
    assert rows[1]["items"] == [1, 2, 3, 4, 5]
    assert rows[1]["feedback"] == [1, 1, 0, 0, 0]
    assert rows[1]["exposure_items"] == [1, 6, 2, 6, 3, 6, 4, 6, 5]
    assert rows[1]["exposure_position"] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert rows[1]["exposure_feedback"] == [129, 0, 129, 0, 128, 0, 128, 0, 128]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "schema_version 1": lambda d: edit(d / "manifest.json", schema_version=99),
    "manifest.json": lambda d: (d / "manifest.json").unlink(),
    "JSON": lambda d: (d / "manifest.json").write_text("]"),
    "JSON object": lambda d: (d / "manifest.json").write_text("[]"),
    "readable dataset manifest": lambda d: edit(d / "manifest.json", counts=None),
    "manifest's file": lambda d: (d / "sessions" / "part-00001.parquet").unlink(),
    "bytes": lambda d: (d / "items.parquet").write_bytes(b"x"),
    "inside the folder": lambda d: edit(
        d / "manifest.json",
        files=[f | {"path": f"../data/{f['path']}"} for f in json.loads((d / "manifest.json").read_text())["files"]],
    ),
}


@pytest.mark.parametrize("expected", DAMAGE)
def test_damaged_dataset_is_refused_with_the_reason(tiny, expected):
    DAMAGE[expected](tiny / "data")
    with pytest.raises(InputError, match=expected):
        open_dataset(tiny / "data")


def test_changed_byte_fails_the_hash_check(tiny):
    path = tiny / "data" / "sessions" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="SHA-256 differs"):
        open_dataset(tiny / "data")
