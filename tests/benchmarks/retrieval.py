"""Retrieval over trained vectors of a large catalogue, each figure beside its yardstick in the same run.

Name a finished run whose bundle has millions of items, and its dataset, in `NEXTCLICK_LARGE=RUN:DATA`, for instance of
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
from pathlib import Path

import faiss
import numpy as np
import psutil
import torch

from etl.contract import open_dataset
from retrieval.bundle import open_bundle
from retrieval.config import load
from retrieval.evaluate import make_catalogue, prepare_index
from retrieval.exact import search_exact
from retrieval.index import FIDELITY_K, Catalogue, Index, Yardstick, measure, norms
from retrieval.stored import Stored, origin

EXACT_HITS, MOST_EXACT = 2_000, 16_384
"""Exact hits wanted for the bound, and queries that are searched exactly for them at the most."""
FIDELITY = 0.999
"""Asked of the index: with 0.99 the lower bound of the HR ratio falls below what is wanted of it."""
MANIFEST = "manifest.json"


def large() -> None:
    """The table of a large catalogue: exact search, index, fidelity, what an evaluation spends its time on."""
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
    exact_rates(catalogue, query[:1024])
    began = time.perf_counter()
    prepare_index(bundle, dataset, catalogue, config)
    print(f"index built, compared, tuned and measured in {time.perf_counter() - began:.0f} s", flush=True)
    index_rates(run, data, catalogue)


QUANTILES = (0, 0.25, 0.5, 0.75, 0.99, 1)


def norm_quantiles(catalogue: Catalogue) -> list[float]:
    return np.quantile(norms(catalogue.vector), QUANTILES).tolist()


def exact_rates(catalogue: Catalogue, query: np.ndarray) -> None:
    """Exact search and a full softmax with top-k, as shares of the matrix product."""
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


def index_rates(run: Path, data: Path, catalogue: Catalogue) -> None:
    """Use the kept index by the program itself; then measure its fidelity over many exact hits."""
    with tempfile.TemporaryDirectory() as folder:
        again = evaluate(run, data, Path(folder) / "result")
    index = again["metrics"]["index"]
    kept = Stored.beside(run / "bundle", index["kind"], origin(run / "bundle" / MANIFEST, catalogue))
    size = kept.path.stat().st_size / 2**30
    print(f"{index['kind']} in the {index['space']} space (recall by space {index['spaces']})")
    print(f"built in {index['build_seconds']:.0f} s, {size:.2f} GiB")
    for tried in index["tuned_on_valid"]:
        effort = tried.get("nprobe", tried.get("efSearch"))
        print(
            f"  effort {effort}: recall@20 {tried['recall']:.4f}, {tried['queries_per_second']:,.0f} queries/s (valid)"
        )
    split, popular = again["metrics"]["test"], again["metrics"]["baselines"]["popularity"]["test"]
    rows = sum(again["metrics"][s]["queries"] for s in ("valid", "test"))
    searched = sum(again["metrics"][s]["ranking_seconds"] for s in ("valid", "test"))
    total = again["seconds"]
    print(
        f"with the kept index: {rows:,} queries ranked in {searched:.0f} s, half as many recommended; all {total:.0f} s"
    )
    print(f"memory over the run (GiB at each tenth): {' '.join(f'{m / 2**30:.2f}' for m in again['memory'])}")
    print(f"test HR@20 {split['hr@20']:.4f}, popularity {popular['hr@20']:.4f}")
    found = kept.load(catalogue)
    tuned = kept.tuned(FIDELITY)
    assert found is not None
    assert tuned is not None
    found.set_effort(tuned["effort"], tuned["refine"])
    fidelity_over_hits(run, catalogue, found)


def fidelity_over_hits(run: Path, catalogue: Catalogue, index: Index) -> None:
    """HR@20 of the index against exact search, over as many queries as it takes for enough exact hits."""
    bundle = open_bundle(run / "bundle", verify=False)
    batches = bundle.queries("test")
    queries = [next(batches)]
    first = measure(index, Yardstick.of(catalogue, queries[0].vector, queries[0].target))
    wanted = min(MOST_EXACT, 1.15 * EXACT_HITS * first.queries / max(first.exact_hits, 1))
    while sum(len(q) for q in queries) < min(wanted, bundle.n_queries("test")):
        queries.append(next(batches))
    vector, target = (np.concatenate([getattr(q, name) for q in queries]) for name in ("vector", "target"))
    found = measure(index, Yardstick.of(catalogue, vector, target))
    print(
        f"fidelity over {found.queries:,} queries, {found.exact_hits:,} exact hits: recall@20 {found.recall:.4f}, "
        f"HR@20 ratio {found.hr_ratio:.4f}, lower bound {found.hr_ratio_low:.4f} (wanted 0.98); "
        f"{found.queries_per_second:,.0f} queries/s against {found.exact_queries_per_second:,.0f} exact"
    )


def evaluate(run: Path, data: Path, output: Path) -> dict:
    """Seconds, memory over time and metrics of `python -m retrieval`."""
    line = [sys.executable, "-m", "retrieval", f"bundle={run / 'bundle'}", f"data={data}", f"output={output}"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*line, "index=auto", f"fidelity={FIDELITY}", "baselines=[popularity]"], stdout=subprocess.DEVNULL
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
    assert process.wait() == 0
    thread.join()
    tenths = [max(part, default=0) for part in np.array_split(memory, 10)]
    metrics = json.loads((output / "metrics.json").read_text())
    return {"seconds": time.perf_counter() - begin, "memory": tenths, "metrics": metrics}
