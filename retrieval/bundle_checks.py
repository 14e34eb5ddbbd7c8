"""Validates a bundle's rows beyond their schema; violations raise `InputError`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.runtime.errors import InputError

HINT = "export the bundle again with python -m trainer"


def check_nulls(kind: str, rows: pa.RecordBatch | pa.Table) -> None:
    """Raise `InputError` if a column, or a list element in it, is null."""
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        nested = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        if column.null_count or (nested and pc.list_flatten(column).null_count):
            raise InputError(f"{kind} without nulls", f"null in column {name}", HINT)


def check_finite(kind: str, vectors: npt.NDArray[np.float32]) -> None:
    """Raise `InputError` if a vector `[rows, D]` has NaN or infinity, which FAISS would accept silently."""
    bad = int((~np.isfinite(vectors)).any(axis=1).sum())
    if bad:
        raise InputError(f"finite {kind} vectors", f"{bad} of {len(vectors)} with NaN or infinity", HINT)


def check_feedback(task: str, rows: pa.Table, n_items: int) -> None:
    """Raise `InputError` for an item outside the catalogue, a label other than 0 and 1, a non-finite score."""
    check_nulls(f"{task} feedback", rows)
    for name, low, high in (("item", 1, n_items), ("label", 0, 1)):
        value = rows[name].to_numpy()
        outside = value[(value < low) | (value > high)]
        if len(outside):
            raise InputError(f"{task} feedback with {name} in {low}..{high}", int(outside[0]), HINT)
    if not np.isfinite(rows["score"].to_numpy()).all():
        raise InputError(f"finite {task} scores", "NaN or infinity", HINT)


def check_users(split: str, files: Sequence[Path]) -> None:
    """Raise `InputError` if a split has a user twice, whom every metric would count twice."""
    columns = [pq.read_table(path, columns=["user_id"])["user_id"].to_numpy() for path in files]
    user = np.sort(np.concatenate([np.zeros(0, np.int64), *columns]))
    twice = user[1:][user[1:] == user[:-1]]
    if len(twice):
        raise InputError(f"one {split} query of a user", f"several of user {twice[0]}", HINT)
