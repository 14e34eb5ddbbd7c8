"""Counted sources over a generated log: build, queries scored per second, V-SkNN against its earlier version."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from scipy import sparse

from retrieval.item_lists import is_among
from retrieval.popularity import Popularity
from retrieval.queries import Queries
from retrieval.rankers.source_ranker import SourceRanker
from retrieval.sources.counts import cosine_lists, successor_lists
from retrieval.sources.scores import DECAY_STEPS, ItemKNNScores, Scores, SuccessorScores, VSkNNScores, repeats
from retrieval.sources.sessions import TrainSessions, rows_of_users
from retrieval.sources.sparse_rows import largest_of_rows, latest_clicks, row_of_entries, seen_matrix
from retrieval.sources.stan import Stan

ITEMS, SESSIONS, CLICKS = 100_000, 100_000, 17
ZIPF = 0.8
QUERIES, TILE = 8_192, 256
NEIGHBOURS, GAPS = 100, 10


def generated(n_items: int = ITEMS, n_sessions: int = SESSIONS) -> TrainSessions:
    """Sessions of `CLICKS` independent clicks, items by Zipf's law."""
    rng = np.random.default_rng(0)
    share = np.cumsum(np.arange(1, n_items + 1) ** -ZIPF)
    items = np.searchsorted(share, rng.random(n_sessions * CLICKS) * share[-1]).astype(np.int32) + 1
    offset = np.arange(n_sessions + 1, dtype=np.int64) * CLICKS
    return TrainSessions(np.arange(n_sessions), offset, np.minimum(items, n_items), n_items)


def queries_of(sessions: TrainSessions, n: int) -> Queries:
    """Queries from the sessions of the first users; the target of each is the first click of the next session."""
    end = sessions.offset[n]
    target = sessions.items[sessions.offset[1 : n + 1]]
    clicks = np.diff(sessions.offset[: n + 1]).astype(np.int32)
    vector = np.zeros((n, 1), np.float32)
    return Queries(sessions.user_id[:n], target, sessions.offset[: n + 1], sessions.items[:end], clicks, vector)


def per_second(work: Callable[[Queries], object], queries: Queries, threads: int) -> float:
    """Queries per second over tiles of `TILE`, `threads` of them at a time; the best of three rounds."""
    tiles = [queries.take(np.arange(i, min(i + TILE, len(queries)))) for i in range(0, len(queries), TILE)]
    work(tiles[0])
    rounds = []
    for _ in range(3):
        begin = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, tiles))
        rounds.append(time.perf_counter() - begin)
    return len(queries) / min(rounds)


def sources() -> None:
    """Sources alone and as baselines (with ranks and lists) at 100,000 items; builds; V-SkNN against the old one."""
    threads = os.cpu_count() or 1
    sessions = generated()
    queries = queries_of(sessions, QUERIES)
    print(f"{ITEMS:,} items, {SESSIONS:,} sessions of {CLICKS} clicks (Zipf {ZIPF}), {QUERIES:,} queries")
    built: dict[str, Scores] = {"repeats": repeats(ITEMS)}
    makers: dict[str, Callable[[], Scores]] = {
        "markov": lambda: SuccessorScores(successor_lists(sessions, 1, 100, threads)),
        "sequential_rules": lambda: SuccessorScores(successor_lists(sessions, GAPS, 100, threads)),
        "item_knn": lambda: ItemKNNScores(cosine_lists(sessions, NEIGHBOURS, threads)),
        "v_sknn": lambda: VSkNNScores.of(sessions, NEIGHBOURS),
        "stan": lambda: Stan.of(sessions, VSkNNScores.of(sessions, NEIGHBOURS).of_item, NEIGHBOURS),
    }
    seconds = {"repeats": 0.0}
    for name, make in makers.items():
        begin = time.perf_counter()
        built[name] = make()
        seconds[name] = time.perf_counter() - begin
    popular = Popularity(np.arange(1, ITEMS + 1), np.bincount(sessions.items, minlength=ITEMS + 1)[1:], ITEMS)
    print(f"| source | build s | scored/s, one core | scored/s, {threads} cores | as a baseline, {threads} cores |")
    print("|---" * 5 + "|")
    for name, source in built.items():
        ranker = SourceRanker(source, popular)
        alone, together = (per_second(source, queries, t) for t in (1, threads))
        ranked = per_second(lambda q, r=ranker: r.tile(q, 20, mask_seen=True), queries, threads)
        print(f"| {name} | {seconds[name]:.1f} | {alone:,.0f} | {together:,.0f} | {ranked:,.0f} |", flush=True)
    new = built["v_sknn"]
    assert isinstance(new, VSkNNScores)
    before = FloatSessions(new)
    for t in dict.fromkeys((1, threads)):
        old, now = (per_second(source, queries, t) for source in (before, new))
        print(f"v_sknn, {t} cores: {now:,.0f} queries/s, {now / old:.2f} × before ({old:,.0f})")
    compare("before", before, new, queries)
    compare("before with exact ties", FloatSessions(new, ties=True), new, queries)


def without_own(weight_QS: sparse.csr_matrix, own_Q: npt.NDArray[np.int64]) -> sparse.csr_matrix:
    weight_QS.data[weight_QS.indices == own_Q[row_of_entries(weight_QS)]] = 0.0
    weight_QS.eliminate_zeros()
    return weight_QS


def compare(name: str, before: Scores, new: Scores, queries: Queries) -> None:
    """Queries with the same scores in both; others differ where rounding separated equal sessions, and by clicks
    on items whose sessions are sampled: the earlier version took the latest shared click from all of them."""
    same, tiles = 0, [queries.take(np.arange(i, i + TILE)) for i in range(0, len(queries), TILE)]
    for tile in tiles:
        a, b = before(tile), new(tile)
        a.sort_indices()
        b.sort_indices()
        for row in range(len(tile)):
            x, y = (m[row] for m in (a, b))
            same += x.nnz == y.nnz and bool((x.indices == y.indices).all() and np.allclose(x.data, y.data, 1e-5))
    print(f"same items and scores (1e-5) as {name}: {same / len(queries):.2%} of the queries")


class FloatSessions:
    """V-SkNN until 2026-11-26: float sums, own session removed first, shared clicks looked up."""

    def __init__(self, of: VSkNNScores, *, ties: bool = False) -> None:
        self.ties = ties  # whether to restore ties of similarities, which float sums of different order break
        self.user_id, self.has, self.of_item, self.neighbours = of.user_id, of.has, of.of_item, of.neighbours

    def __call__(self, queries: Queries) -> sparse.csr_matrix:
        n_items = self.has.shape[1] - 1
        position = np.arange(len(queries.seen)) - np.repeat(queries.seen_offset[:-1], queries.n_seen)
        length = np.repeat(queries.n_seen, queries.n_seen)
        late = seen_matrix(queries, (position + 1) / length, n_items)
        similarity = without_own((late @ self.of_item).tocsr(), rows_of_users(self.user_id, queries.user_id))
        if self.ties:
            n_seen = queries.n_seen[row_of_entries(similarity)]
            similarity.data = (np.rint(similarity.data * n_seen) / n_seen).astype(np.float32)
        best = largest_of_rows(similarity, self.neighbours)
        step = np.maximum(1.0 - (length - 1 - position) / DECAY_STEPS, 1e-9).astype(np.float32)
        best.data *= self._latest_shared(queries, step, best)
        return (best @ self.has).tocsr()

    def _latest_shared(
        self, queries: Queries, step_N: npt.NDArray[np.float32], best_QS: sparse.csr_matrix
    ) -> npt.NDArray[np.float32]:
        query, last = latest_clicks(queries)
        pair, value = query << 32 | queries.seen[last], step_N[last]
        begin = self.has.indptr[best_QS.indices].astype(np.int64)
        count = self.has.indptr[best_QS.indices + 1] - begin
        offset = np.cumsum(count) - count
        entry = np.arange(count.sum()) + np.repeat(begin - offset, count)
        wanted = np.repeat(row_of_entries(best_QS) << 32, count) | self.has.indices[entry]
        shared = np.flatnonzero(is_among(wanted, pair))
        steps = np.zeros(len(wanted), np.float32)
        steps[shared] = value[np.searchsorted(pair, wanted[shared])]
        return np.maximum.reduceat(steps, offset) if len(offset) else steps
