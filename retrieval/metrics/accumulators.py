"""Accumulators of an evaluation: sums and counts over queries, in total, by segment and by recommended item.

They can be written, read and merged, so that parts of the queries can be ranked on any machine in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from etl.dataset import Dataset
from etl.runtime.arrays import IntArray
from etl.runtime.files import write_json
from etl.runtime.lookup import lookup
from retrieval.metrics.ranking import RankingSums, gini
from retrieval.queries import Queries

LENGTHS = ((3, 4), (5, 9), (10, 14), (15, 29), (30, None))
"""Ranges of retained clicks of a session, inclusive; the last one is open."""
DECILES = 10
Segments = Iterable[tuple[str, str, npt.NDArray[np.bool_]]]
"""Kind, name and mask `[Q]` of each segment of queries."""


@dataclass(frozen=True)
class SegmentAttributes:
    """Item and user attributes that define query segments.

    Attributes:
        train_clicks: int64 `[n_items + 1]`.
        decile: int8 `[n_items + 1]`, 1 = the most clicked items, which have a tenth of all train clicks; 0 = none.
        user_id: int64 `[U]`, sorted.
        profile: int8 `[U, 2]`, gender and age, -1 = unknown.
    """

    train_clicks: IntArray
    decile: npt.NDArray[np.int8]
    user_id: IntArray
    profile: npt.NDArray[np.int8]

    @classmethod
    def of(cls, dataset: Dataset) -> SegmentAttributes:
        """Read the attributes of a dataset."""
        clicks = np.concatenate([[0], dataset.items(["train_clicks"])["train_clicks"].to_numpy()])
        users, profiles = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int8)]
        for entry in dataset.session_files:
            table = pq.read_table(dataset.file(entry.path), columns=["user_id", "gender", "age"])
            users.append(table["user_id"].to_numpy())
            profiles.append(np.stack([table[name].to_numpy() for name in ("gender", "age")], axis=1))
        user, order = np.concatenate(users), np.argsort(np.concatenate(users), kind="stable")
        return cls(clicks, deciles(clicks), user[order], np.concatenate(profiles)[order])

    def profile_of(self, user_Q: IntArray) -> npt.NDArray[np.int8]:
        """Gender and age of users `[Q, 2]`; -1 for users that are not in the dataset."""
        row, known = lookup(self.user_id, user_Q)
        return np.where(known[:, None], self.profile[row], np.int8(-1))


def deciles(train_clicks: IntArray) -> npt.NDArray[np.int8]:
    """Popularity decile of each item: each has a tenth of all train clicks, 1 = most clicked; 0 = no clicks.

    >>> deciles(np.array([0, 5, 4, 1])).tolist()
    [0, 1, 6, 10]
    """
    order = np.argsort(-train_clicks, kind="stable")
    before = np.cumsum(train_clicks[order]) - train_clicks[order]
    out = np.zeros(len(train_clicks), np.int8)
    out[order] = 1 + before * DECILES // max(int(train_clicks.sum()), 1)
    out[train_clicks == 0] = 0
    return out


def segments(queries: Queries, clicks_after: int, attributes: SegmentAttributes) -> Segments:
    """Kind, name and mask `[Q]` of each segment of queries."""
    length = queries.n_seen + clicks_after
    for low, high in LENGTHS:
        yield "session_length", f"{low}-{high}" if high else f"{low}+", (length >= low) & (length <= (high or length))
    decile = attributes.decile[queries.target]
    for number in range(1, DECILES + 1):
        yield "target_popularity", str(number), decile == number
    yield "target_popularity", "cold", decile == 0
    profile = attributes.profile_of(queries.user_id)
    for column, kind in enumerate(("gender", "age")):
        for value in np.unique(profile[:, column]).tolist():
            yield kind, "unknown" if value < 0 else str(value), profile[:, column] == value


class RankingResult:
    """Metric sums in total and by segment, and recommendation counts by item.

    Args:
        cutoffs: cutoffs of the metrics, sorted.
        n_items: items of the dataset.
    """

    def __init__(self, cutoffs: Sequence[int], n_items: int) -> None:
        self.cutoffs = list(cutoffs)
        self.total = RankingSums(self.cutoffs)
        self.segments: dict[tuple[str, str], RankingSums] = {}
        self.shown = np.zeros((len(self.cutoffs), n_items + 1), np.int32)
        self.flat_index: list[IntArray] = []
        self.seconds = 0.0

    def add(
        self,
        queries: Queries,
        clicks_after: int,
        rank: IntArray,
        lists: Any,
        attributes: SegmentAttributes,
        more: Segments = (),
    ) -> None:
        """Add a batch: ranks of its targets and top lists; `more` are segments besides those by `attributes`."""
        repeat = queries.is_repeat
        self.total.add(rank, repeat)
        for kind, name, inside in (*segments(queries, clicks_after, attributes), *more):
            if inside.any():
                segment = self.segments.setdefault((kind, name), RankingSums(self.cutoffs))
                segment.add(rank[inside], repeat[inside])
        begin = 0
        for row, cutoff in enumerate(self.cutoffs):
            item, times = np.unique(lists[:, begin:cutoff], return_counts=True)
            self.shown[row, item] += times.astype(np.int32)
            self.flat_index.append(item + row * np.int64(self.shown.shape[1]))
            begin = cutoff

    def write(self, path: Path) -> None:
        """Write to `path.json` and `path.npz`; floats round-trip exactly."""
        # A part lists only thousands of millions of items.
        flat_index = np.unique(np.concatenate([np.zeros(0, np.int64), *self.flat_index]))
        np.savez(path.with_suffix(".npz"), flat_index=flat_index, times=self.shown.ravel()[flat_index])
        record = {"total": self.total.plain(), "seconds": self.seconds}
        record["segments"] = [[*key, result.plain()] for key, result in self.segments.items()]
        write_json(path.with_suffix(".json"), record)

    def add_written(self, path: Path) -> None:
        """Add the result of another part, as written by `write`."""
        record = json.loads(path.with_suffix(".json").read_text())
        self.total.merge(RankingSums.from_plain(self.cutoffs, record["total"]))
        self.seconds += record["seconds"]
        for kind, name, plain in record["segments"]:
            segment = self.segments.setdefault((kind, name), RankingSums(self.cutoffs))
            segment.merge(RankingSums.from_plain(self.cutoffs, plain))
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            self.shown.ravel()[arrays["flat_index"]] += arrays["times"]

    def metrics(self, train_clicks: IntArray, n_candidates: int) -> dict[str, Any]:
        """The metrics of one split for `metrics.json`.

        Args:
            train_clicks: `[n_items + 1]`.
            n_candidates: number of candidates.
        """
        out: dict[str, Any] = dict(self.total.averages())
        times = np.cumsum(self.shown, axis=0)[:, 1:]
        clicks = train_clicks[1:]
        surprise = -np.log2((clicks + 1) / (clicks.sum() + len(clicks)))
        for row, cutoff in zip(times, self.cutoffs, strict=True):
            listed = max(int(row.sum()), 1)
            out[f"coverage@{cutoff}"] = int((row > 0).sum()) / n_candidates
            out[f"gini@{cutoff}"] = gini(row[row > 0], n_candidates)
            out[f"popularity@{cutoff}"] = float(row @ clicks) / listed
            out[f"novelty@{cutoff}"] = float(row @ surprise) / listed
        out["queries"] = self.total.queries
        out["repeat_share"] = self.total.repeats / self.total.queries if self.total.queries else None
        for (kind, name), totals in sorted(self.segments.items(), key=lambda pair: _in_order(*pair[0])):
            out.setdefault(kind, {})[name] = {"queries": totals.queries, **totals.averages()}
        out["ranking_seconds"] = self.seconds
        return out


def _in_order(kind: str, name: str) -> tuple[str, int, str]:
    digits = name.split("-")[0].rstrip("+")
    return kind, int(digits) if digits.isdigit() else 1_000, name
