"""Counted sources and their blend at the size of QK-video: seconds and memory to build, queries ranked per second.

Sessions are independent clicks by Zipf's law and vectors are random, so only speed is meaningful. The number of
sessions is `NEXTCLICK_SESSIONS` (default: 3,200,000, of 28 clicks).
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from retrieval.blend.context import CandidateFeatures
from retrieval.blend.fitted import FOLDS, FittedBlend, Weights
from retrieval.blend.pool import MIN_CANDIDATES, Pools
from retrieval.blend.ranker import BlendRanker
from retrieval.popularity import Popularity
from retrieval.queries import Queries
from retrieval.rankers.registry import MODEL
from retrieval.search.index import Catalogue, build_index
from retrieval.sources.scores import Scores, SuccessorScores, popularity
from retrieval.sources.sessions import TrainSessions
from retrieval.sources.store import COUNTED, SourceFiles, SourceOptions, stored_name
from tests.benchmarks.sources import ZIPF, per_second, queries_of

ITEMS, SESSIONS, CLICKS = 3_753_436, 3_200_000, 28
WIDTH, PROBES = 64, 16
QUERIES = 4_096
DRAWN_AT_ONCE = 1 << 22


def large_blend() -> None:
    """Each source's build and rate, then the blend of all, with peak resident memory."""
    sessions = drawn(int(os.environ.get("NEXTCLICK_SESSIONS", str(SESSIONS))))
    threads = os.cpu_count() or 1
    queries = with_vectors(queries_of(sessions, QUERIES))
    clicks = np.bincount(sessions.items, minlength=ITEMS + 1)[1:]
    print(f"{ITEMS:,} items, {len(sessions.user_id):,} sessions, {len(sessions.items):,} clicks, {QUERIES:,} queries")
    print(f"| part | build s | peak GiB | queries/s, {threads} cores |\n|---|---|---|---|")
    popular = Popularity(np.arange(1, ITEMS + 1), clicks, ITEMS)
    with tempfile.TemporaryDirectory(dir=os.environ.get("NEXTCLICK_BENCH")) as folder:
        for name, counted_source in COUNTED.items():
            files = files_of(Path(folder), name)
            with watched() as spent:
                if files.load() is None:  # other sources may have stored these files
                    files.save(counted_source.build(sessions, OPTIONS, threads), {})
            source = opened(Path(folder), name)
            rate = per_second(source, queries, threads)
            print(f"| {name} | {spent['seconds']:.0f} | {spent['gib']:.1f} | {rate:,.0f} |", flush=True)
            del source
        del sessions
        with watched() as spent:
            rng = np.random.default_rng(1)
            vector = rng.standard_normal((ITEMS, WIDTH), np.float32)
            catalogue = Catalogue(np.arange(1, ITEMS + 1, dtype=np.int32), vector)
            index = build_index("ivf_flat", catalogue, "augmented")
            index.set_search_effort(PROBES)
        rate = per_second(lambda q: index.search(q.vector, MIN_CANDIDATES), queries, 1)
        seconds, gib = spent["seconds"], spent["gib"]
        print(f"| index (ivf_flat, {PROBES} probes) | {seconds:.0f} | {gib:.1f} | {rate:,.0f} |", flush=True)
        with watched() as spent:
            counted = {name: opened(Path(folder), name) for name in COUNTED}
            sources: dict[str, Scores | None] = {MODEL: None, **counted}
            sources["popularity"] = popularity(popular, MIN_CANDIDATES, mask_seen=True)
            markov = counted["markov"]
            assert isinstance(markov, SuccessorScores)
            candidate_features = CandidateFeatures(popular, np.zeros(ITEMS + 1, np.int64), markov.lists)
            pools = Pools(sources, index, popular, mask_seen=True)
            weights = Weights(dict.fromkeys(sources, 1 / len(sources)))
            learned = FittedBlend(list(sources), 1.0, "sum", weights, [weights] * FOLDS, {})
            ranker = BlendRanker(learned, pools, pools, candidate_features, 20, threads)
            rate = best_of_three(lambda: ranker.rank(queries, "test", variants=False))
        print(f"| blend (sum) | {spent['seconds']:.0f} | {spent['gib']:.1f} | {rate:,.0f} |")
        parts = {name: 1000 * seconds / QUERIES / 3 for name, seconds in ranker.spent().items() if seconds}
        print("milliseconds of one core a query: " + ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items()))


OPTIONS = SourceOptions(held_out=2, rules_per_item=100, gaps=10, neighbours=100)


def drawn(n_sessions: int) -> TrainSessions:
    """Sessions of `CLICKS` clicks; drawn block by block, so that drawing does not determine the peak memory."""
    rng = np.random.default_rng(0)
    share = np.cumsum(np.arange(1, ITEMS + 1) ** -ZIPF)
    items = np.empty(n_sessions * CLICKS, np.int32)
    for begin in range(0, len(items), DRAWN_AT_ONCE):
        block = items[begin : begin + DRAWN_AT_ONCE]
        block[:] = np.minimum(np.searchsorted(share, rng.random(len(block)) * share[-1]), ITEMS - 1) + 1
    return TrainSessions(np.arange(n_sessions), np.arange(n_sessions + 1, dtype=np.int64) * CLICKS, items, ITEMS)


def with_vectors(queries: Queries) -> Queries:
    """The queries with random vectors of `WIDTH`."""
    vector = np.random.default_rng(2).standard_normal((len(queries), WIDTH), np.float32)
    q = queries
    return Queries(q.user_id, q.target, q.seen_offset, q.seen, q.n_clicks, vector)


def files_of(folder: Path, name: str) -> SourceFiles:
    """The files that a source reads."""
    return SourceFiles(folder, stored_name(name), stored_name(name))


def opened(folder: Path, name: str) -> Scores:
    """A source over its files, mapped into memory."""
    arrays = files_of(folder, name).load()
    assert arrays is not None
    return COUNTED[name].open(arrays, OPTIONS)


def best_of_three(work: Callable[[], object]) -> float:
    """Queries per second, best of three rounds."""
    rounds = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        rounds.append(time.perf_counter() - begin)
    return QUERIES / min(rounds)


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds and peak resident memory of this process during a block."""
    spent, done, process = {"gib": 0.0, "seconds": 0.0}, threading.Event(), psutil.Process()

    def watch() -> None:
        while not done.wait(0.05):
            spent["gib"] = max(spent["gib"], process.memory_info().rss / 2**30)

    thread, begin = threading.Thread(target=watch, daemon=True), time.perf_counter()
    thread.start()
    try:
        yield spent
    finally:
        spent["seconds"] = time.perf_counter() - begin
        done.set()
        thread.join()
