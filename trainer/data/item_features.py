"""Item features from the text columns of the dataset's `items.parquet`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.dataset import Dataset
from etl.runtime.arrays import IntArray
from etl.runtime.dataset_folder import ITEMS
from etl.runtime.errors import InputError

MAX_VALUES = 10_000
"""Maximum values of a column that feedback towers read by default: its embeddings get a dense update each step."""


def feedback_columns(dataset: Dataset, item_features: list[str]) -> list[str]:
    """Default columns of the feedback towers: those of the item features (else the category) that are small."""
    columns = dataset.items(item_features or ["category"])
    return [name for name in columns.column_names if 0 < pc.count_distinct(columns[name]).as_py() <= MAX_VALUES]


def check_columns(dataset: Dataset, option: str, columns: list[str]) -> None:
    """Raise `InputError` if an option names a column that is not a text column of the dataset."""
    schema = pq.read_schema(dataset.file(ITEMS))
    known = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    for column in columns:
        if column not in known:
            hint = "name text columns of the dataset's items.parquet"
            raise InputError(f"{option} of {', '.join(known)}", column, hint)


def feature_codes(dataset: Dataset, columns: list[str]) -> tuple[IntArray, dict[str, dict[str, int]]]:
    """Encode item features as integers.

    Returns:
        int64 `[n_items + 1, C]`: code of each item's value, 0 = unknown and padding; no two columns share a code.
        By column the code of each value, values sorted.
    """
    codes, vocabulary, first = [np.zeros((dataset.manifest.n_items + 1, 0), np.int64)], {}, 1
    for column in columns:
        code, names = dataset.value_codes(column)
        codes.append(np.where(code > 0, code + first - 1, 0)[:, None])
        vocabulary[column] = {name: first + row for row, name in enumerate(names)}
        first += len(names)
    return np.concatenate(codes, axis=1), vocabulary
