"""Item features from the text columns of the dataset's `items.parquet`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.dataset import Dataset
from etl.runtime.dataset_folder import ITEMS
from etl.runtime.errors import InputError
from trainer.data.order import Int

MOST_VALUES = 10_000
"""Of a column that feedback towers read unasked: its embeddings are updated whole in each step."""


def feedback_columns(dataset: Dataset, item_features: list[str]) -> list[str]:
    """What feedback towers read where no columns are named: of the item features, else the category, what is small."""
    columns = dataset.items(item_features or ["category"])
    return [name for name in columns.column_names if 0 < pc.count_distinct(columns[name]).as_py() <= MOST_VALUES]


def check_columns(dataset: Dataset, option: str, columns: list[str]) -> None:
    """Raise `InputError` where a column that an option names is none of the dataset's text columns."""
    schema = pq.read_schema(dataset.file(ITEMS))
    known = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    for column in columns:
        if column not in known:
            hint = "name text columns of the dataset's items.parquet"
            raise InputError(f"{option} of {', '.join(known)}", column, hint)


def feature_codes(dataset: Dataset, columns: list[str]) -> tuple[Int, dict[str, dict[str, int]]]:
    """Codes of the items' features and what they stand for.

    Returns:
        int64 `[n_items + 1, C]`: code of each item's value, 0 = unknown and padding; no two columns share a code.
        By column the code of each value, in the order of their names.
    """
    codes, vocabulary, first = [np.zeros((dataset.manifest.n_items + 1, 0), np.int64)], {}, 1
    for column in columns:
        code, names = dataset.value_codes(column)
        codes.append(np.where(code > 0, code + first - 1, 0)[:, None])
        vocabulary[column] = {name: first + row for row, name in enumerate(names)}
        first += len(names)
    return np.concatenate(codes, axis=1), vocabulary
