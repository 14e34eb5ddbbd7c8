"""The frozen tiny bundle: evaluate it, or change it in place."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq

from retrieval.bundle import (
    ITEMS,
    MANIFEST,
    TRANSITIONS,
    finish_bundle,
    items_schema,
    open_bundle,
    queries_schema,
    vectors_array,
)
from retrieval.config import load
from retrieval.evaluate import evaluate
from tests.data import TINY


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


def other_model(path, *, dimension=5, drop_user=False):
    """The tiny bundle with random vectors of another dimension, and the rows of its query files in reverse order."""
    shutil.copytree(TINY / "bundle", path)
    shutil.rmtree(path / TRANSITIONS, ignore_errors=True)
    manifest, rng = open_bundle(TINY / "bundle").manifest, np.random.default_rng(3)
    for file in [path / ITEMS, *path.glob("queries-*/*.parquet")]:
        table = pq.read_table(file)
        vector = 3 * rng.normal(size=(len(table), dimension)) + 1
        is_items = file.name == ITEMS
        schema = (items_schema if is_items else queries_schema)(dimension)
        place = table.schema.get_field_index("vector")
        table = table.set_column(place, schema.field("vector"), vectors_array(vector)).select(schema.names)
        if not is_items:
            table = table.take(np.arange(len(table) - drop_user)[::-1])
        pq.write_table(table.cast(schema), file)
    finish_bundle(
        path, dataset=manifest.dataset, refit=False, n_items=manifest.n_items, dimension=dimension, model="other"
    )
    return path
