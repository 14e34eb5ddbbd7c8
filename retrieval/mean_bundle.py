"""The mean of several models' normalised scores, as a bundle.

A query's scores `s_i = <q, v_i>` over all items have the mean `<q, m>` and the variance `q' C q`, with the mean `m` and
the covariance `C` of the item vectors. So the normalised score `(s_i - mean) / deviation` is an inner product too,
`<q / deviation, v_i - m>`, and a mean of normalised scores is an inner product of concatenated vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.runtime.errors import InputError
from etl.runtime.files import atomic_folder
from retrieval.bundle import (
    ITEMS,
    QUERY_SPLITS,
    Bundle,
    finish_bundle,
    items_schema,
    open_bundle,
    queries_schema,
    vectors_array,
)
from retrieval.bundle_folder import SELECTED

Vectors = npt.NDArray[np.float32]


def write_mean(paths: Sequence[str], output: Path) -> None:
    """Write a bundle that scores by the mean of the bundles' normalised scores, with concatenated vectors.

    Of refit models the bundles before the refit are averaged too, next to the output: an evaluation tunes on them.

    Raises:
        InputError: bundles of different datasets or queries, without vectors, or with counted transitions; for refit
            models, an output whose folder has such a bundle already.
    """
    bundles = [open_bundle(path) for path in paths]
    _check_alike(bundles)
    if bundles[0].manifest.refit:
        selected = output.absolute().parent / SELECTED
        if selected.exists():
            raise InputError(f"an output without {SELECTED} beside it", output, "write output=NEW_FOLDER/bundle")
        _write_mean([open_bundle(bundle.sibling(SELECTED)) for bundle in bundles], selected)
    _write_mean(bundles, output)


def _write_mean(bundles: Sequence[Bundle], output: Path) -> None:
    first = bundles[0].manifest
    centred, covariance = zip(*(centred_items(bundle.item_vectors()) for bundle in bundles), strict=True)
    dimension = sum(bundle.manifest.dimension for bundle in bundles)
    with atomic_folder(output) as folder:
        items = {"item": pa.array(np.arange(1, first.n_items + 1, dtype=np.int32))}
        vectors = vectors_array(np.concatenate(centred, axis=1))
        pq.write_table(pa.table([items["item"], vectors], schema=items_schema(dimension)), folder / ITEMS)
        for split in QUERY_SPLITS:
            tables = [queries_by_user(bundle, split) for bundle in bundles]
            if not len(tables[0]):
                continue
            _check_same_queries(split, tables)
            parts = [
                scaled_queries(vectors_of(table), c) / len(bundles) for table, c in zip(tables, covariance, strict=True)
            ]
            columns = [tables[0][name].combine_chunks() for name in ("user_id", "target", "seen", "n_clicks")]
            columns.append(vectors_array(np.concatenate(parts, axis=1).astype(np.float32)))
            (folder / f"queries-{split}").mkdir()
            table = pa.table(columns, schema=queries_schema(dimension))
            pq.write_table(table, folder / f"queries-{split}" / "part-00000.parquet")
        names = " and ".join(bundle.manifest.model for bundle in bundles)
        finish_bundle(
            folder,
            dataset=first.dataset,
            refit=first.refit,
            n_items=first.n_items,
            dimension=dimension,
            model=f"mean of {names}",
        )


def centred_items(vector_ID: Vectors) -> tuple[Vectors, npt.NDArray[np.float64]]:
    """Centred item vectors, float32 `[I, D]`, and their covariance, float64 `[D, D]`."""
    centred = vector_ID - vector_ID.mean(axis=0, dtype=np.float64)
    return centred.astype(np.float32), centred.T @ centred / len(centred)


def scaled_queries(query_QD: Vectors, covariance_DD: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Queries divided by the standard deviation of their scores, float64 `[Q, D]`; zeros if all scores are equal."""
    query = query_QD.astype(np.float64)
    variance = np.einsum("qd,de,qe->q", query, covariance_DD, query, optimize=True)
    deviation = np.sqrt(np.maximum(variance, 0.0))[:, None]
    return np.divide(query, deviation, out=np.zeros_like(query), where=deviation > 0)


def queries_by_user(bundle: Bundle, split: str) -> pa.Table:
    """All queries of a split, sorted by user."""
    entries = bundle.files_by_kind.get(f"queries-{split}", [])
    if not entries:
        return queries_schema(bundle.manifest.dimension).empty_table()
    return pa.concat_tables([pq.read_table(bundle.path / entry.path) for entry in entries]).sort_by("user_id")


def vectors_of(table: pa.Table) -> Vectors:
    """Query vectors float32 `[Q, D]`."""
    vectors: Vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return vectors


def _check_alike(bundles: Sequence[Bundle]) -> None:
    first = bundles[0].manifest
    for manifest in (bundle.manifest for bundle in bundles):
        if not manifest.dimension or manifest.transition_terms:
            got = "counted transitions" if manifest.dimension else "feedback alone"
            raise InputError("bundles whose scores are inner products", f"{got} of {manifest.model}", "leave it out")
        if (manifest.dataset, manifest.refit) != (first.dataset, first.refit):
            raise InputError("bundles of one dataset, all refit or none", manifest.model, "train them alike")


def _check_same_queries(split: str, tables: Sequence[pa.Table]) -> None:
    names = ["user_id", "target", "seen"]
    if any(not table.select(names).equals(tables[0].select(names)) for table in tables):
        raise InputError(f"bundles with the same {split} queries", "others", "train them on the same dataset")
