"""The bundle: vectors and scores of a trained model, exported for evaluation.

To read or write bundles, import this module; it needs only the standard library, numpy and pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.dataset import (
    FEEDBACK_LABELS,
    REFIT_HOLDOUT,
    TRAIN_HOLDOUT,
    DataFile,
    check_files,
    check_schema,
    describe_file,
    read_manifest,
)
from etl.runtime.dataset_folder import MANIFEST
from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from etl.runtime.object_store import absolute, download_if_remote
from retrieval.bundle_checks import HINT, check_feedback, check_finite, check_nulls, check_users
from retrieval.queries import Queries

SCHEMA_VERSION = 1
BATCH = 4_096
"""Minimum queries per batch (fewer only in the last)."""
ITEMS = "items.parquet"
QUERY_SPLITS = ("valid", "test", "next")
TRANSITIONS = "transitions"
TRANSITIONS_SCHEMA = pa.schema(
    [
        pa.field("item", pa.int32(), nullable=False),
        pa.field("other", pa.int32(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
"""Schema of `rules`, `cosine` and `markov.parquet`: what an item adds to another's score; sorted by both ids."""
FEEDBACK_SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("clicked", pa.bool_(), nullable=False),
        pa.field("label", pa.uint8(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)


def items_schema(dimension: int) -> pa.Schema:
    """Columns of `items.parquet`, rows in the order of dense ids 1..n_items."""
    return pa.schema([pa.field("item", pa.int32(), nullable=False), _vector_field(dimension)])


def queries_schema(dimension: int, terms: int = 0) -> pa.Schema:
    """Columns of `queries-*/part-*.parquet`; `target` is 0 in `queries-next`; `terms` transition weights."""
    fields = [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("target", pa.int32(), nullable=False),
        pa.field("seen", pa.list_(pa.int32()), nullable=False),
        pa.field("n_clicks", pa.int32(), nullable=False),
        _vector_field(dimension),
    ]
    return pa.schema([*fields, _vector_field(terms, "transition_weight")] if terms else fields)


def _vector_field(dimension: int, name: str = "vector") -> pa.Field:
    return pa.field(name, pa.list_(pa.float32(), dimension), nullable=False)


@dataclass(frozen=True)
class BundleManifest:
    """The manifest of a bundle; written last.

    Attributes:
        dataset: fingerprint of the dataset the bundle was made from.
        refit: whether the model was trained on the valid clicks, so that there are no valid files.
        dimension: dimension of the vectors; 0 for a bundle with feedback only.
        model: display name of the model.
        transition_terms: number of transition terms in the score; 0 = none.
    """

    dataset: str
    refit: bool
    n_items: int
    dimension: int
    model: str
    files: list[DataFile]
    schema_version: int = SCHEMA_VERSION
    transition_terms: int = 0


@dataclass(frozen=True)
class Bundle:
    """An opened bundle folder.

    Attributes:
        path: the local folder.
        manifest: its manifest.
        files_by_kind: data files by kind.
        source: the path or URI that was opened.
    """

    path: Path
    manifest: BundleManifest
    files_by_kind: dict[str, list[DataFile]] = field(repr=False)
    source: str

    def sibling(self, name: str) -> str:
        """Path or URI of a sibling of the bundle in its run."""
        return f"{absolute(self.source).rstrip('/').rpartition('/')[0]}/{name}"

    @property
    def held_out(self) -> int:
        """Final retained clicks of a session that the model was not trained on, and that sources do not count."""
        return REFIT_HOLDOUT if self.manifest.refit else TRAIN_HOLDOUT

    @property
    def has_vectors(self) -> bool:
        """Whether it supports retrieval; ranking models only score feedback."""
        return self.manifest.dimension > 0

    def item_vectors(self) -> npt.NDArray[np.float32]:
        """Vectors of items 1..n_items, `[n_items, D]`.

        Raises:
            InputError: ids other than 1..n_items in order, or a non-finite vector.
        """
        n, begin = self.manifest.n_items, 0
        vectors = np.empty((n, self.manifest.dimension), np.float32)
        with pq.ParquetFile(self.path / ITEMS) as file:
            for batch in file.iter_batches(1 << 17) if file.metadata.num_rows == n else ():
                check_nulls(ITEMS, batch)
                end = begin + len(batch)
                if not np.array_equal(batch["item"].to_numpy(), np.arange(begin + 1, end + 1)):
                    break
                vectors[begin:end] = batch["vector"].flatten().to_numpy().reshape(len(batch), -1)
                begin = end
        if begin != n:
            raise InputError(f"{ITEMS} with items 1..{n} once each in order", "other ids or an id twice", HINT)
        check_finite("item", vectors)
        return vectors

    def n_queries(self, split: str) -> int:
        """Number of queries of a split, 0 if the bundle lacks it."""
        return sum(part.rows for part in self.files_by_kind.get(f"queries-{split}", []))

    def queries(self, split: str, batch_size: int = BATCH) -> Iterator[Queries]:
        """Stream the queries of a split in the order of its files."""
        return self.queries_of(self.files_by_kind.get(f"queries-{split}", []), batch_size)

    def sample_queries(self, split: str, n: int) -> list[Queries]:
        """At most `n` queries of a split, evenly spaced; may be empty."""
        total, begin, batches = self.n_queries(split), 0, []
        sampled = (
            np.unique(np.linspace(0, total - 1, min(total, n)).astype(np.int64)) if total else np.zeros(0, np.int64)
        )
        for queries in self.queries(split):
            rows = sampled[(sampled >= begin) & (sampled < begin + len(queries))] - begin
            begin += len(queries)
            if len(rows):
                batches.append(queries.take(rows))
        return batches

    def queries_of(self, files: Sequence[DataFile], batch_size: int = BATCH) -> Iterator[Queries]:
        """Stream the queries of some files, joined to batches of at least `batch_size`."""
        waiting: list[Queries] = []
        for part in files:
            with pq.ParquetFile(self.path / part.path) as file:
                for batch in file.iter_batches(batch_size):
                    waiting.append(Queries.from_batch(batch, self.manifest.n_items))
                    if sum(map(len, waiting)) >= batch_size:
                        yield Queries.joined(waiting)
                        waiting = []
        if waiting:
            yield Queries.joined(waiting)

    def feedback_tasks(self, split: str) -> list[str]:
        """Tasks with feedback rows in a split."""
        names: dict[str, None] = {}
        for part in self.files_by_kind.get(f"feedback-{split}", []):
            names |= dict.fromkeys(pq.read_table(self.path / part.path, columns=["task"])["task"].unique().to_pylist())
        unknown = [name for name in names if name not in FEEDBACK_LABELS]
        if unknown:
            raise InputError(f"feedback tasks of {', '.join(FEEDBACK_LABELS)}", unknown[0], HINT)
        return list(names)

    def feedback(self, split: str, task: str) -> pa.Table:
        """Feedback rows of a task: `user_id`, `item`, `clicked`, `label`, `score`.

        Raises:
            InputError: a null, an item outside the catalogue, a label other than 0 and 1, a non-finite score.
        """
        columns, rows = FEEDBACK_SCHEMA.names[1:], [("task", "=", task)]
        files = self.files_by_kind[f"feedback-{split}"]
        result = pa.concat_tables([pq.read_table(self.path / p.path, columns=columns, filters=rows) for p in files])
        check_feedback(task, result, self.manifest.n_items)
        return result


def open_bundle(path: str | Path, *, dataset: str | None = None, verify: bool = True) -> Bundle:
    """Open a bundle and check that it is complete.

    Args:
        path: the bundle's folder, or its URI, which is downloaded.
        dataset: expected fingerprint of its dataset.
        verify: whether to hash every file.

    Raises:
        InputError: not a complete bundle, or made from another dataset.
    """
    folder = download_if_remote(path, last_file=MANIFEST)
    raw = read_manifest(folder, kind="a bundle", hint="give RUN/bundle of a finished training run")
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"bundle schema_version {SCHEMA_VERSION}", raw.get("schema_version"), HINT)
    manifest = parse_manifest(folder / MANIFEST, raw)
    if dataset is not None and manifest.dataset != dataset:
        raise InputError(
            f"a bundle of dataset {dataset[:12]}…",
            f"one of {manifest.dataset[:12]}…",
            "set data to the dataset it was trained on",
        )
    check_files(folder, manifest.files, verify=verify, hint=HINT)
    if manifest.dimension and ITEMS not in {entry.path for entry in manifest.files}:
        raise InputError(f"a bundle manifest that lists {ITEMS}", "none", HINT)
    files: dict[str, list[DataFile]] = {}
    for entry in manifest.files:
        kind = entry.path.partition("/")[0]
        schema = _schema_of(kind, manifest)
        if schema is not None:
            check_schema(folder / entry.path, schema, hint=HINT)
            rows = pq.read_metadata(folder / entry.path).num_rows
            if rows != entry.rows:
                raise InputError(f"{entry.rows} rows in {entry.path}, as the manifest says", rows, HINT)
            files.setdefault(kind, []).append(entry)
    if len(files.get(TRANSITIONS, [])) != manifest.transition_terms:
        raise InputError(f"{manifest.transition_terms} files of transitions", len(files.get(TRANSITIONS, [])), HINT)
    if manifest.refit and {"queries-valid", "feedback-valid"} & set(files):
        raise InputError("no valid files in a refit bundle", "valid files", HINT)
    bundle = Bundle(folder, manifest, files, str(path))
    for split in QUERY_SPLITS if verify else ():
        check_users(split, [folder / part.path for part in files.get(f"queries-{split}", [])])
    return bundle


def parse_manifest(path: Path, raw: dict[str, Any]) -> BundleManifest:
    """Parse and check a manifest's JSON.

    Raises:
        InputError: a missing or unknown key, or a value of the wrong type.
    """
    try:
        manifest = BundleManifest(**{**raw, "files": [DataFile(**entry) for entry in raw["files"]]})
        types = {"dataset": str, "refit": bool, "n_items": int, "dimension": int, "model": str, "transition_terms": int}
        wrong = [name for name, kind in types.items() if type(getattr(manifest, name)) is not kind]
        wrong += [f"files of {entry.path!r}" for entry in manifest.files if type(entry.path) is not str]
        if wrong or manifest.n_items < 1 or manifest.dimension < 0:
            raise ValueError(f"{(wrong or ['n_items or dimension'])[0]} is not what it should be")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("a readable bundle manifest", f"{path}: {error!r}", HINT) from None
    return manifest


def _schema_of(kind: str, manifest: BundleManifest) -> pa.Schema | None:
    if kind == ITEMS:
        return items_schema(manifest.dimension)
    if kind.startswith("queries-"):
        return queries_schema(manifest.dimension, manifest.transition_terms)
    if kind == TRANSITIONS:
        return TRANSITIONS_SCHEMA
    return FEEDBACK_SCHEMA if kind.startswith("feedback-") else None


def finish_bundle(
    folder: Path, *, dataset: str, refit: bool, n_items: int, dimension: int, model: str, transition_terms: int = 0
) -> None:
    """Hash the files in `folder` and write the manifest, which completes the bundle."""
    paths = sorted(path for path in folder.rglob("*.parquet"))
    files = [describe_file(folder, p.relative_to(folder).as_posix(), pq.read_metadata(p).num_rows) for p in paths]
    manifest = BundleManifest(dataset, refit, n_items, dimension, model, files, transition_terms=transition_terms)
    write_json(folder / MANIFEST, asdict(manifest))


def vectors_array(vector_ND: npt.NDArray[np.float32]) -> pa.Array:
    """Vectors as an Arrow column of fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(vector_ND, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vector_ND.shape[1])


def lists_array(offset: npt.NDArray[Any], values: npt.NDArray[Any]) -> pa.Array:
    """Flat values as an Arrow column of lists, `offset` `[rows + 1]`."""
    return pa.ListArray.from_arrays(pa.array(offset.astype(np.int32)), pa.array(values))
