"""A batch of queries: users, seen items, query vectors and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from etl.runtime.errors import InputError
from retrieval.bundle_checks import HINT, check_finite, check_nulls
from retrieval.ragged import concat_ranges

VECTORS = ("vector", "transition_weight")


@dataclass(frozen=True)
class Queries:
    """A batch of Q queries.

    Attributes:
        user_id: int64 `[Q]`.
        target: int32 `[Q]`, dense id; 0 in `next`.
        seen_offset: int64 `[Q + 1]` into `seen`.
        seen: int32, input clicks of the queries, truncated, oldest first.
        n_clicks: int32 `[Q]`, the user's clicks before truncation.
        vector: float32 `[Q, D]`.
        transition_weight: float32 `[Q, T]`, at least 0; `[Q, 0]` for models without transitions.
        computed: cache of values derived from the batch, by name, with their inputs.
    """

    user_id: npt.NDArray[np.int64]
    target: npt.NDArray[np.int32]
    seen_offset: npt.NDArray[np.int64]
    seen: npt.NDArray[np.int32]
    n_clicks: npt.NDArray[np.int32]
    vector: npt.NDArray[np.float32]
    transition_weight: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    computed: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.transition_weight) != len(self.user_id):
            object.__setattr__(self, "transition_weight", np.zeros((len(self.user_id), 0), np.float32))

    def __len__(self) -> int:
        return len(self.user_id)

    def take(self, row_N: npt.NDArray[np.integer]) -> Queries:
        """Select queries by number, in the order of `row_N`."""
        offset, index = concat_ranges(self.seen_offset[row_N], self.n_seen[row_N])
        rows = {name: getattr(self, name)[row_N] for name in ("user_id", "target", "n_clicks", *VECTORS)}
        return Queries(seen_offset=offset, seen=self.seen[index], **rows)

    def latest(self, n: int) -> Queries:
        """The same queries with only the last `n` seen clicks."""
        n_seen = np.minimum(self.n_seen, n)
        offset, index = concat_ranges(self.seen_offset[1:] - n_seen, n_seen)
        return replace(self, seen_offset=offset, seen=self.seen[index])

    @classmethod
    def joined(cls, batches: Sequence[Queries]) -> Queries:
        """Concatenate batches."""
        if len(batches) == 1:
            return batches[0]
        offset = np.concatenate([[0], np.cumsum(np.concatenate([batch.n_seen for batch in batches]))])
        arrays = {
            name: np.concatenate([getattr(batch, name) for batch in batches])
            for name in ("user_id", "target", "seen", "n_clicks", *VECTORS)
        }
        return cls(seen_offset=offset, **arrays)

    @property
    def n_seen(self) -> npt.NDArray[np.int64]:
        """Number of seen clicks per query `[Q]`."""
        return np.diff(self.seen_offset)

    @property
    def is_repeat(self) -> npt.NDArray[np.bool_]:
        """Whether each target is among the query's seen items `[Q]`."""
        hit = self.seen == np.repeat(self.target, self.n_seen)
        return np.bincount(np.repeat(np.arange(len(self)), self.n_seen)[hit], minlength=len(self)) > 0

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch, n_items: int) -> Queries:
        """Check and convert rows of a queries file.

        Raises:
            InputError: a null, a non-finite vector, an item outside the catalogue, a query without seen clicks.
        """
        check_nulls("queries", batch)
        seen = batch.column("seen")
        offset = seen.offsets.to_numpy().astype(np.int64)
        vectors = {
            name: batch.column(name).flatten().to_numpy().reshape(len(batch), -1)
            for name in VECTORS
            if name in batch.schema.names
        }
        queries = cls(
            batch.column("user_id").to_numpy(),
            batch.column("target").to_numpy(),
            offset - (offset[0] if len(offset) else 0),
            seen.flatten().to_numpy(),
            batch.column("n_clicks").to_numpy(),
            **vectors,
        )
        for name, ids in (("target", queries.target), ("seen", queries.seen)):
            low = 0 if name == "target" else 1
            if len(ids) and not low <= ids.min() <= ids.max() <= n_items:
                outside = int(ids.min() if ids.min() < low else ids.max())
                raise InputError(f"{name} items in 1..{n_items}", outside, HINT)
        if (queries.n_seen < 1).any():
            raise InputError("queries that have seen a click", f"{int((queries.n_seen < 1).sum())} without", HINT)
        check_finite("query", queries.vector)
        check_finite("query's transition", queries.transition_weight)
        if (queries.transition_weight < 0).any():
            raise InputError("transition weights of at least 0", float(queries.transition_weight.min()), HINT)
        return queries


def sample_index(number_N: npt.NDArray[np.int64], total: int, n: int) -> npt.NDArray[np.int64]:
    """Index of each number among `n` (at most `total`) evenly spaced ones of `total`; -1 if it is not among them.

    >>> sample_index(np.arange(7), 7, 3).tolist()
    [-1, -1, 0, -1, 1, -1, 2]
    """
    index = number_N * n // total
    return np.where((number_N + 1) * n // total > index, index, -1)
