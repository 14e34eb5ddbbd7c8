"""The dataset folder: schema, manifest, split rule, and validation by readers.

To read or write datasets, import only this module and `etl.runtime`, which need the standard library, numpy and
pyarrow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.runtime.dataset_folder import ITEMS, MANIFEST
from etl.runtime.errors import InputError
from etl.runtime.files import sha256_of
from etl.runtime.object_store import download_if_remote

SCHEMA_VERSION = 1
STATISTICS = "statistics.json"
SESSIONS_FOLDER = "sessions"
ROWS_FOLDER = "rows"
SPLITS = ("train", "valid", "test")
HELD_OUT = {"valid": 2, "test": 1, "next": 0}
"""The split rule: number of final retained clicks hidden from a split's query. The last click is the test target, the
second last the valid target; `next` sees all."""
TRAIN_HOLDOUT, REFIT_HOLDOUT = HELD_OUT["valid"], HELD_OUT["test"]
"""Final retained clicks that are excluded from training and counting; a refit also trains on the valid target."""
QUARANTINE_FOLDER = "quarantine"

PADDING = 0
"""Dense id that is never an item; dense ids of items are 1..n_items."""

FEEDBACK_BIT = {"like": 0, "share": 1, "follow": 2, "read": 3, "favorite": 4, "click": 7}
"""Bit of each action in `feedback` and `exposure_feedback` (`click` only in the latter)."""
PLURAL = {"like": "likes", "share": "shares", "follow": "follows", "read": "reads", "favorite": "favorites"}
"""Names of the counts of actions in `statistics.json`."""
CLICKED = 1 << FEEDBACK_BIT["click"]
PASSIVE = "passive"
"""Label of a row that was clicked without further action: one of the two definitions of negative feedback."""
FEEDBACK_LABELS = (*FEEDBACK_BIT, PASSIVE)

UNKNOWN = -1
"""`gender` and `age` if unknown."""

SESSIONS_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("items", pa.list_(pa.int32()), nullable=False),
        pa.field("feedback", pa.list_(pa.int8()), nullable=False),
        pa.field("watching_times", pa.list_(pa.int32()), nullable=False),
        pa.field("n_clicks", pa.int32(), nullable=False),
        pa.field("gender", pa.int8(), nullable=False),
        pa.field("age", pa.int8(), nullable=False),
        pa.field("exposure_items", pa.list_(pa.int32()), nullable=False),
        pa.field("exposure_position", pa.list_(pa.int16()), nullable=False),
        pa.field("exposure_feedback", pa.list_(pa.int16()), nullable=False),
    ]
)
"""One row per user. `items`, `feedback` and `watching_times` are parallel: the retained clicks, oldest first.

`feedback` has the bits of `FEEDBACK_BIT` without click; `watching_times` is a number of visits (Tenrec's name), 0 =
unknown; `n_clicks` counts clicks before truncation. `exposure_*` are parallel: the shown items in order, each with the
number of retained clicks before it (0..n) and its bits with click.
"""

ROWS_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("gender", pa.int8(), nullable=False),
        pa.field("age", pa.int8(), nullable=False),
        pa.field("history", pa.list_(pa.int32()), nullable=False),
        *(pa.field(name, pa.int8(), nullable=False) for name in ("click", "like", "share", "follow")),
        pa.field("split", pa.string(), nullable=False),
    ]
)
"""Scenario `ctr`: one row per exposure; `history` holds the log's `hist_1…10`, padded with 0.

In Tenrec's file these are the user's first ten clicks, the same on all rows of a user.
"""

ITEMS_SCHEMA = pa.schema(
    [
        pa.field("item", pa.int32(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("train_clicks", pa.int64(), nullable=False),
        pa.field("clicks", pa.int64(), nullable=False),
        pa.field("exposures", pa.int64(), nullable=False),
        pa.field("category", pa.string()),
    ]
)
"""Row i has the item with dense id i + 1.

`item_id` is the log's id; `train_clicks` are retained clicks without the valid and test clicks, `clicks` and
`exposures` all retained ones.
"""


@dataclass(frozen=True)
class DataFile:
    """A file of an artefact: `path` relative to its folder, rows, bytes and SHA-256."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """An input of the dataset; `fingerprint` hashes the bytes that were read."""

    name: str
    bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a dataset folder; written last, so a folder with a manifest is complete."""

    scenario: str
    protocol: dict[str, Any]
    source: list[Source]
    fingerprint: str
    counts: dict[str, int]
    files: list[DataFile]
    schema_version: int = SCHEMA_VERSION

    @property
    def n_items(self) -> int:
        """Size of the catalogue; dense ids are 1..n_items."""
        return self.counts["items"]

    @property
    def max_clicks(self) -> int:
        """Longest possible session in clicks."""
        return int(self.protocol["max_clicks"])

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Dataset:
    """An opened dataset folder."""

    path: Path
    manifest: Manifest
    session_files: list[DataFile] = field(repr=False)
    row_files: list[DataFile] = field(repr=False)

    def file(self, name: str) -> Path:
        """Absolute path of a file of the dataset."""
        return self.path / name

    def statistics(self) -> dict[str, Any]:
        """Content of `statistics.json`: `raw` counts of the log, `kept` counts of the retained part, and more."""
        return dict(json.loads(self.file(STATISTICS).read_text()))

    @property
    def shows_exposures(self) -> bool:
        """Whether the dataset has exposures."""
        return bool(self.manifest.protocol.get("exposures", True))

    def category_codes(self) -> npt.NDArray[np.int64]:
        """Code of each item's category `[n_items + 1]`, ordered by name; 0 = unknown or padding."""
        return self.value_codes("category")[0]

    def value_codes(self, column: str) -> tuple[npt.NDArray[np.int64], list[str]]:
        """Code of each item's value in a text column `[n_items + 1]`, 0 = null or padding; values[i] has code i + 1."""
        values = self.items([column])[column].combine_chunks()
        names = sorted(value for value in values.unique().to_pylist() if value is not None)
        codes = pc.index_in(values, pa.array(names, values.type)).fill_null(-1).to_numpy()
        return np.concatenate([[0], codes.astype(np.int64) + 1]), names

    def items(self, columns: list[str] | None = None) -> pa.Table:
        """Read `items.parquet`, one row per item, sorted by dense id."""
        return pq.read_table(self.path / ITEMS, columns=columns)


def open_dataset(path: str | Path, *, verify: bool = True) -> Dataset:
    """Open a dataset folder and check that it is complete.

    Args:
        path: a folder written by `python -m etl`, or its URI, which is downloaded.
        verify: whether to hash every file; otherwise only sizes are compared.

    Raises:
        InputError: no manifest, another schema version, a missing or changed file.
    """
    folder = download_if_remote(path, last_file=MANIFEST)
    hint = "run python -m etl again"
    raw = read_manifest(folder, kind="a dataset", hint="set it to a folder written by python -m etl")
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"dataset schema_version {SCHEMA_VERSION}", version, hint)
    try:
        manifest = Manifest(
            scenario=str(raw["scenario"]),
            protocol=dict(raw["protocol"]),
            source=[Source(**entry) for entry in raw["source"]],
            fingerprint=str(raw["fingerprint"]),
            counts={name: int(value) for name, value in raw["counts"].items()},
            files=[DataFile(**entry) for entry in raw["files"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("a readable dataset manifest", f"{folder / MANIFEST}: {error!r}", hint) from None
    check_files(folder, manifest.files, verify=verify, hint=hint)
    sessions, rows = (
        [f for f in manifest.files if f.path.startswith(f"{kind}/")] for kind in (SESSIONS_FOLDER, ROWS_FOLDER)
    )
    schemas = [(ITEMS, ITEMS_SCHEMA), *((f.path, SESSIONS_SCHEMA) for f in sessions)]
    for name, schema in (*schemas, *((f.path, ROWS_SCHEMA) for f in rows)):
        check_schema(folder / name, schema, hint=hint)
    return Dataset(folder, manifest, sessions, rows)


def read_manifest(folder: Path, *, kind: str, hint: str) -> dict[str, Any]:
    """The manifest of an artefact folder as JSON.

    Raises:
        InputError: no readable manifest, so the folder is not complete.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{kind} folder with {MANIFEST}", str(folder), hint)
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{kind} manifest in JSON", f"{path}: {error}", hint) from None
    if not isinstance(raw, dict):
        raise InputError(f"{kind} manifest that is a JSON object", str(path), hint)
    return raw


def check_files(folder: Path, files: Iterable[DataFile], *, verify: bool, hint: str) -> None:
    """Compare files on disk with the manifest's entries.

    Raises:
        InputError: a path outside the folder, a missing file, or changed content.
    """
    for entry in files:
        relative = PurePosixPath(entry.path)
        if relative.is_absolute() or ".." in relative.parts:
            raise InputError("manifest paths inside the folder", entry.path, hint)
        path = folder / entry.path
        if not path.is_file():
            raise InputError(f"the manifest's file {entry.path}", f"no such file in {folder}", hint)
        if path.stat().st_size != entry.bytes:
            raise InputError(f"{path} of {entry.bytes} bytes", f"{path.stat().st_size} bytes", hint)
        if verify and sha256_of(path) != entry.sha256:
            raise InputError(f"{path} as in its manifest", "other content (SHA-256 differs)", hint)


def check_schema(path: Path, schema: pa.Schema, *, hint: str) -> None:
    """Check that a Parquet file has the columns of `schema` with their types.

    Raises:
        InputError: not a Parquet file, a missing column, or a column of another type.
    """
    try:
        found = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"a Parquet file at {path}", str(error).splitlines()[0], hint) from None
    for column in schema:
        index = found.get_field_index(column.name)
        got = found.field(index).type if index >= 0 else None
        if got is None or not _same_type(got, column.type):
            raise InputError(f"{path} with column {column.name}: {column.type}", got, hint)


def _same_type(a: pa.DataType, b: pa.DataType) -> bool:
    """Whether types are equal, ignoring the names of list element fields."""
    if pa.types.is_list(a) and pa.types.is_list(b):
        return _same_type(a.value_type, b.value_type)
    if pa.types.is_fixed_size_list(a) and pa.types.is_fixed_size_list(b):
        return a.list_size == b.list_size and _same_type(a.value_type, b.value_type)
    return bool(a.equals(b))


def describe_file(folder: Path, name: str, rows: int) -> DataFile:
    """The manifest entry of a file that was just written."""
    path = folder / name
    return DataFile(name, rows, path.stat().st_size, sha256_of(path))


def feedback_labels(feedback: Any, task: str) -> Any:
    """0/1 labels of `task`, one of `FEEDBACK_LABELS`, from feedback bits (any integer array, clicked in bit 7)."""
    if task == PASSIVE:
        return (feedback == CLICKED).astype(feedback.dtype)
    return (feedback >> FEEDBACK_BIT[task]) & 1
