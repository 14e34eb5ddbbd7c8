"""The rank of every target, as a Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.queries import Queries


class RankWriter:
    """Writes `ranks.parquet`: the rank of every target, for significance tests and other metrics.

    Args:
        path: path of the file.
        deepest: larger ranks are written as `deepest + 1`, since most are not known exactly.
    """

    SCHEMA = pa.schema(
        [
            ("ranker", pa.dictionary(pa.int8(), pa.string())),
            ("split", pa.dictionary(pa.int8(), pa.string())),
            ("user_id", pa.int64()),
            ("target", pa.int32()),
            ("rank", pa.int32()),
        ]
    )

    def __init__(self, path: Path, deepest: int) -> None:
        self.writer, self.deepest = pq.ParquetWriter(path, self.SCHEMA, compression="zstd"), deepest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()

    def add(self, ranker: str, split: str, queries: Queries, rank_Q: npt.NDArray[np.int64]) -> None:
        """Write a batch."""
        same = [pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(queries), np.int8)), [x]) for x in (ranker, split)]
        rank = np.minimum(rank_Q, self.deepest + 1).astype(np.int32)
        columns = [*same, pa.array(queries.user_id), pa.array(queries.target), pa.array(rank)]
        self.writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self.SCHEMA))


def read_ranks(path: Path, split: str = "test", rankers: Sequence[str] = ()) -> dict[str, pa.Table]:
    """Read `ranks.parquet` of a split by ranker: tables of `user_id`, `target`, `rank`, sorted by user.

    Args:
        path: path of the file.
        split: valid or test.
        rankers: names of the rankers to read; empty = all.
    """
    filters = [("split", "=", split), *([("ranker", "in", list(rankers))] if rankers else [])]
    table = pq.read_table(path, filters=filters).unify_dictionaries()
    names = pa.compute.unique(table["ranker"]).to_pylist()
    columns = ["user_id", "target", "rank"]
    return {n: table.filter(pa.compute.equal(table["ranker"], n)).select(columns).sort_by("user_id") for n in names}
