"""Ragged arrays: variable-length lists as one flat array and offsets, and groups of contiguous rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from etl.runtime.arrays import IntArray


@dataclass(frozen=True)
class Ragged:
    """Variable-length lists: row i is `values[offset[i]:offset[i + 1]]`."""

    offset: IntArray
    values: npt.NDArray[Any]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Ragged:
        """From an Arrow list column without nulls."""
        array = column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
        offset = array.offsets.to_numpy().astype(np.int64)
        return cls(offset - offset[0], array.flatten().to_numpy())

    @property
    def lengths(self) -> IntArray:
        """Length of each list."""
        return np.diff(self.offset)

    def take(self, row_N: IntArray) -> Ragged:
        """Select lists by row number, in the order of `row_N`."""
        lengths = self.lengths[row_N]
        offset = np.concatenate([[0], np.cumsum(lengths)])
        index = np.arange(offset[-1]) + np.repeat(self.offset[row_N] - offset[:-1], lengths)
        return Ragged(offset, self.values[index])

    @property
    def row(self) -> IntArray:
        """Row number of each value."""
        return np.repeat(np.arange(len(self.offset) - 1), self.lengths)

    @property
    def index_in_row(self) -> IntArray:
        """Index of each value in its list, from 0."""
        return np.arange(len(self.values)) - np.repeat(self.offset[:-1], self.lengths)


def cumcount(group_R: IntArray) -> IntArray:
    """Index of each row in its group, from 0; the rows of a group are contiguous."""
    begin = np.flatnonzero(np.diff(group_R, prepend=-1))
    return np.arange(len(group_R)) - np.repeat(begin, np.diff(np.append(begin, len(group_R))))
