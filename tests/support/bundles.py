"""The frozen tiny bundle: evaluated, and changed in place."""

from __future__ import annotations

import json

import pyarrow.parquet as pq

from retrieval.bundle import MANIFEST, finish_bundle, vectors_array
from retrieval.config import load
from retrieval.evaluate import evaluate


def run(tiny, name="out", *options):
    return evaluate(
        load(
            [f"bundle={tiny / 'bundle'}", f"data={tiny / 'data'}", f"output={tiny / name}", "cutoffs=[1,2,5]", *options]
        )
    )


def rewrite_items(tiny, change):
    path = tiny / "bundle" / "items.parquet"
    table = pq.read_table(path)
    pq.write_table(change(table), path)
    raw = json.loads((tiny / "bundle" / MANIFEST).read_text())
    finish_bundle(tiny / "bundle", dataset=raw["dataset"], refit=False, n_items=6, dimension=2, model="tiny")


def with_vector(table, value):
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(6, 2).copy()
    vectors[3, 1] = value
    return table.set_column(1, table.schema.field("vector"), vectors_array(vectors))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
