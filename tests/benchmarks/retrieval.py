"""Retrieval over trained vectors of a large catalogue, each figure compared with exact search in the same run.

`NEXTCLICK_LARGE=RUN:DATA` gives a finished run whose bundle has millions of items, and its dataset, for instance from
`python -m etl.twin scenario=qk_video users=500000 items=3753436`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import faiss
import numpy as np
import psutil
import torch

from etl.dataset import open_dataset
from retrieval import evaluate as program
from retrieval.bundle import open_bundle
from retrieval.config import load
from retrieval.evaluation import Evaluation
from retrieval.search.exact import search_exact
from retrieval.search.index import Catalogue, Index, norms
from retrieval.search.index_file import IndexFile, origin
from retrieval.search.prepare import make_catalogue, prepare_index
from retrieval.search.tuning import FIDELITY_K, ExactReference, measure
from tests.support.fidelity import joined

EXACT_HITS, BOUND = 2_000, 0.98
"""Number of exact hits over which the HR ratio is measured, and the required lower bound of the ratio."""
QUERIES = 100_000
"""Number of queries over which the search's share of the time is measured."""
FIDELITY = 0.99
MANIFEST = "manifest.json"


def large() -> None:
    """The table of a large catalogue: exact search, index, fidelity, time profile of an evaluation."""
    named = os.environ.get("NEXTCLICK_LARGE", "")
    if ":" not in named:
        print("NEXTCLICK_LARGE=RUN:DATA names no run: nothing to do")
        return
    run, data = map(Path, named.split(":"))
    config = load([f"bundle={run / 'bundle'}", f"data={data}", "output=unused", "index=auto", f"fidelity={FIDELITY}"])
    dataset, bundle = open_dataset(data, verify=False), open_bundle(run / "bundle", verify=False)
    catalogue = make_catalogue(bundle, dataset, config)
    c, d = catalogue.vector.shape
    print(f"{c:,} candidates × {d}, {os.cpu_count()} cores")
    print("norms: " + ", ".join(f"{q:.0%} {v:.2f}" for q, v in zip(QUANTILES, norm_quantiles(catalogue), strict=True)))
    query = np.concatenate([q.vector for q, _ in zip(bundle.queries("test"), range(1), strict=False)])
    softmax = exact_rates(catalogue, query[:1024])
    began = time.perf_counter()
    prepare_index(bundle, dataset, catalogue, config)
    print(f"index built, compared, tuned and measured in {time.perf_counter() - began:.0f} s", flush=True)
    index_rates(run, data, catalogue, softmax)


QUANTILES = (0, 0.25, 0.5, 0.75, 0.99, 1)


def norm_quantiles(catalogue: Catalogue) -> list[float]:
    return np.quantile(norms(catalogue.vector), QUANTILES).tolist()


def exact_rates(catalogue: Catalogue, query: np.ndarray) -> float:
    """Exact search relative to the matrix product, and a full softmax with top-k, whose queries/s are returned."""
    c, d = catalogue.vector.shape
    q, v = torch.from_numpy(query), torch.from_numpy(catalogue.vector)
    part = v[: c // 8].t().contiguous()
    q @ part
    begin = time.perf_counter()
    q @ part
    product = 2 * len(query) * d * part.shape[1] / (time.perf_counter() - begin)
    begin = time.perf_counter()
    search_exact(catalogue.vector, query, FIDELITY_K)
    ours = len(query) / (time.perf_counter() - begin)
    begin = time.perf_counter()
    for i in range(0, 256, 64):
        torch.topk(torch.softmax(q[i : i + 64] @ v.t(), dim=1), FIDELITY_K)
    softmax = 256 / (time.perf_counter() - begin)
    begin = time.perf_counter()
    faiss.knn(query[:64], catalogue.vector, FIDELITY_K, metric=faiss.METRIC_INNER_PRODUCT)
    knn = 64 / (time.perf_counter() - begin)
    print(f"matrix product {product / 1e9:.1f} GFLOP/s")
    print(f"exact search {ours:,.0f} queries/s: {ours * 2 * c * d / product:.0%} of the matrix product (wanted 60 %)")
    print(f"faiss.knn {knn:,.0f} queries/s; torch softmax + top-k {softmax:,.1f} queries/s", flush=True)
    return softmax


def index_rates(run: Path, data: Path, catalogue: Catalogue, softmax: float) -> None:
    """Use the saved index through the program; then measure its fidelity over many exact hits."""
    with tempfile.TemporaryDirectory() as folder:
        again = evaluate(run, data, Path(folder) / "result")
    index = again["metrics"]["index"]
    index_file = IndexFile.for_bundle(run / "bundle", index["kind"], origin(run / "bundle" / MANIFEST, catalogue))
    size = index_file.path.stat().st_size / 2**30
    print(f"{index['kind']} in the {index['space']} space (recall by space {index['spaces']})")
    print(f"built in {index['build_seconds']:.0f} s, {size:.2f} GiB")
    for tried in index["tuned_on_valid"]:
        effort = tried.get("nprobe", tried.get("efSearch"))
        print(
            f"  effort {effort}: recall@20 {tried['recall']:.4f}, {tried['queries_per_second']:,.0f} queries/s (valid)"
        )
    split, popular = again["metrics"]["test"], again["metrics"]["baselines"]["popularity"]["test"]
    total, ranked, searched, rows = (again[name] for name in ("seconds", "parts", "search", "queries"))
    print(
        f"with the kept index: {rows:,} queries in {total:.0f} s, {ranked:.0f} s of them in parts, {searched:.0f} s of"
    )
    share = QUERIES * searched / (rows * (total - ranked) + QUERIES * ranked)
    print(f"search: {searched / total:.0%} of the whole; {share:.0%} of what {QUERIES:,} queries would take")
    print(f"memory over the run (GiB at each tenth): {' '.join(f'{m / 2**30:.2f}' for m in again['memory'])}")
    print(f"test HR@20 {split['hr@20']:.4f}, popularity {popular['hr@20']:.4f}", flush=True)
    actual = index_file.load(catalogue)
    assert actual is not None
    fidelity_over_hits(run, catalogue, actual, softmax)


def fidelity_over_hits(run: Path, catalogue: Catalogue, index: Index, softmax: float) -> None:
    """HR@20 by search effort against exact search, over enough test queries for `EXACT_HITS` exact hits.

    The complete curve is printed, up to the first effort whose bound is high enough and whose recall is 0.999 or more.
    """
    bundle = open_bundle(run / "bundle", verify=False)
    sticks, hits = [], 0
    for queries in bundle.queries("test"):
        sticks.append(ExactReference.of(catalogue, queries.vector, queries.target))
        hits += int((sticks[-1].exact == catalogue.rows_of(queries.target)[:, None]).any(axis=1).sum())
        if hits >= EXACT_HITS:
            break
    whole = joined(sticks)
    print(
        f"over {len(whole.query):,} test queries with {hits:,} exact hits, searched exactly in {whole.seconds:.0f} s:"
    )
    effort = 1
    while True:
        index.set_search_effort(effort)
        actual = measure(index, whole)
        assert actual.hr_ratio is not None
        assert actual.hr_ratio_low is not None
        print(
            f"  effort {effort}: recall@20 {actual.recall:.4f}, HR@20 ratio {actual.hr_ratio:.4f}, lower bound "
            f"{actual.hr_ratio_low:.4f} (wanted {BOUND}), {actual.queries_per_second:,.0f} queries/s: "
            f"{actual.queries_per_second / softmax:,.0f} × the softmax (wanted 100)",
            flush=True,
        )
        if (actual.hr_ratio_low >= BOUND and actual.recall >= 0.999) or effort >= index.max_search_effort:
            return
        effort *= 2


def timed(options: list[str]) -> None:
    """Evaluate like `python -m retrieval`, and print the seconds spent on parts and on search."""
    spent = {"parts": 0.0, "search": 0.0, "queries": 0.0}

    def wrapped(work: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            out = work(*arguments, **named)
            spent[name] += time.perf_counter() - begin
            return out

        return call

    mock.patch.object(Index, "search", wrapped(Index.search, "search")).start()
    mock.patch.object(Evaluation, "run", wrapped(Evaluation.run, "parts")).start()
    config = load(options)
    program.evaluate(config)
    bundle = open_bundle(config.bundle, verify=False)
    spent["queries"] = sum(bundle.n_queries(split) for split in ("valid", "test", "next"))
    print(json.dumps(spent))


def evaluate(run: Path, data: Path, output: Path) -> dict[str, Any]:
    """Seconds, memory over time and metrics of an evaluation in a subprocess."""
    code = "import sys; from tests.benchmarks.retrieval import timed; timed(sys.argv[1:])"
    options = [f"bundle={run / 'bundle'}", f"data={data}", f"output={output}", "index=auto", f"fidelity={FIDELITY}"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options, "baselines=[popularity]"], stdout=subprocess.PIPE, text=True
    )
    memory: list[int] = []

    def watch() -> None:
        while process.poll() is None:
            try:
                memory.append(psutil.Process(process.pid).memory_info().rss)
            except psutil.NoSuchProcess:
                return
            time.sleep(0.5)

    thread = threading.Thread(target=watch)
    thread.start()
    message, _ = process.communicate()
    seconds = time.perf_counter() - begin
    assert process.returncode == 0
    thread.join()
    tenths = [max(part, default=0) for part in np.array_split(memory, 10)]
    metrics = json.loads((output / "metrics.json").read_text())
    return {"seconds": seconds, "memory": tenths, "metrics": metrics, **json.loads(message.splitlines()[-1])}
