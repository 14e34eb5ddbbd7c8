"""Bundles and datasets that are broken or do not belong together."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.runtime.errors import InputError
from retrieval.__main__ import main
from retrieval.bundle import ITEMS, MANIFEST, Bundle, BundleManifest, finish_bundle, open_bundle
from tests.support.bundles import flip, rewrite_items, with_vector

BROKEN = {
    "a flipped byte": lambda t: flip(t / "bundle" / "items.parquet"),
    "a cut file": lambda t: (t / "bundle" / "items.parquet").write_bytes(b"PAR1"),
    "a missing file": lambda t: (t / "bundle" / "items.parquet").unlink(),
    "no manifest": lambda t: (t / "bundle" / MANIFEST).unlink(),
    "a manifest that is no JSON": lambda t: (t / "bundle" / MANIFEST).write_text("{"),
    "a manifest with a path outside": lambda t: edit_manifest(t / "bundle" / MANIFEST, path="../data/items.parquet"),
    "another dataset": lambda t: edit_manifest(t / "bundle" / MANIFEST, dataset="0" * 64),
    "NaN": lambda t: rewrite_items(t, lambda table: with_vector(table, np.nan)),
    "infinity": lambda t: rewrite_items(t, lambda table: with_vector(table, np.inf)),
    "an item twice": lambda t: rewrite_items(
        t, lambda x: x.set_column(0, x.schema.field(0), pa.array([1, 2, 3, 4, 5, 5], pa.int32()))
    ),
    "a manifest without files": lambda t: edit_manifest(t / "bundle" / MANIFEST, files=None),
    "a manifest whose dimension is a word": lambda t: edit_manifest(t / "bundle" / MANIFEST, dimension="2"),
    "a manifest of more rows": lambda t: edit_manifest(t / "bundle" / MANIFEST, rows=7),
    "a manifest without its items": lambda t: edit_manifest(t / "bundle" / MANIFEST, files=[]),
    "an empty seen": lambda t: rewrite(t, "queries-test", seen=[[], *[[1]] * 11]),
    "a null seen": lambda t: rewrite(t, "queries-test", seen=[None, *[[1]] * 11]),
    "a null in seen": lambda t: rewrite(t, "queries-next", seen=[[1, None], *[[1]] * 11]),
    "a user twice": lambda t: rewrite(t, "queries-test", user_id=[1, *range(1, 12)]),
    "no query for next": lambda t: rewrite(t, "queries-next", rows=0),
    "no query for valid": lambda t: rewrite(t, "queries-valid", rows=0),
    "label 2": lambda t: rewrite(t, "feedback-test", label=[2] * 24),
    "item 0 in feedback": lambda t: rewrite(t, "feedback-valid", item=[0] * 24),
    "an unknown task": lambda t: rewrite(t, "feedback-test", task=["jump"] * 24),
    "a null score": lambda t: rewrite(t, "feedback-test", score=[None] * 24),
    "a NaN score": lambda t: rewrite(t, "feedback-test", score=[np.nan] * 24),
    "a dataset file that differs": lambda t: flip(t / "data" / "items.parquet"),
}


def rewrite(tiny, part, rows=None, **columns):
    """Rewrite a file of a bundle with other columns or only its first rows, and the manifest to match."""
    (path,) = (tiny / "bundle" / part).glob("*.parquet")
    table = pq.read_table(path).slice(0, rows)
    for name, values in columns.items():
        field = table.schema.field(name).with_nullable(True)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values[: len(table)], field.type))
    pq.write_table(table, path)
    rewrite_items(tiny, lambda items: items)


def edit_manifest(manifest, **changes):
    raw = json.loads(manifest.read_text())
    if "path" in changes:
        raw["files"][0]["path"] = changes.pop("path")
    if "rows" in changes:
        raw["files"][0]["rows"] = changes.pop("rows")
    manifest.write_text(json.dumps(raw | changes))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_fails_with_a_one_line_error_and_no_output(tiny, name, capfd):
    BROKEN[name](tiny)
    status = main([f"bundle={tiny / 'bundle'}", f"data={tiny / 'data'}", f"output={tiny / 'out'}", "cutoffs=[1,2]"])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1
    assert ", got " in err
    assert not (tiny / "out").exists()


def test_targets_outside_the_catalogue_are_refused(tiny):
    path = tiny / "bundle" / "queries-test" / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, table.schema.field("target"), pa.array([7] * 12, pa.int32())), path)
    raw = json.loads((tiny / "bundle" / MANIFEST).read_text())
    finish_bundle(tiny / "bundle", dataset=raw["dataset"], refit=False, n_items=6, dimension=2, model="tiny")
    with pytest.raises(InputError, match=r"target items in 1\.\.6, got 7"):
        list(open_bundle(tiny / "bundle").queries("test"))


def test_more_items_than_in_the_manifest_are_refused_in_any_batch(tmp_path):
    """Vectors are read in batches; here the surplus item is in a batch of its own."""
    n = 1 << 17
    item = np.concatenate([np.arange(1, n + 1), [1]]).astype(np.int32)
    vector = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(len(item), np.float32)), 1)
    pq.write_table(pa.table({"item": item, "vector": vector}), tmp_path / ITEMS)
    manifest = BundleManifest("", refit=False, n_items=n, dimension=1, model="", files=[])
    with pytest.raises(InputError, match="once each in order"):
        Bundle(tmp_path, manifest, {}, str(tmp_path)).item_vectors()
