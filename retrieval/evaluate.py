"""The whole evaluation on one page: a bundle → metrics, recommendations and a report."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.contract import MANIFEST, Dataset, open_dataset
from etl.folder import InputError, refuse_existing, staged, write_json
from retrieval.bundle import Bundle, lists_array, open_bundle
from retrieval.config import RetrievalConfig
from retrieval.index import (
    FIDELITY_K,
    Catalogue,
    Index,
    Yardstick,
    build_index,
    choose_kind,
    compare_spaces,
    measure,
    norms,
    tune,
)
from retrieval.metrics import feedback_metrics
from retrieval.ranking import RankWriter, evaluate_queries, seen_among
from retrieval.report import write_report
from retrieval.stored import Stored, origin

METRICS = "metrics.json"
TOPK = "topk.parquet"
RANKS = "ranks.parquet"
REPORT = "report.html"
SAMPLE_QUERIES = 2_000


def evaluate(config: RetrievalConfig) -> dict[str, Any]:
    """Make the result folder `config.output`, whole or not at all, and return its metrics.

    Raises:
        InputError: a bundle, dataset or option that the user must mend.
    """
    faiss.omp_set_num_threads(config.threads or (faiss.omp_get_max_threads()))
    output = Path(config.output)
    refuse_existing(output, overwrite=config.overwrite, is_whole=is_result)
    dataset = open_dataset(config.data)
    bundle = open_bundle(config.bundle, dataset=dataset.manifest.fingerprint)
    with staged(output, overwrite=config.overwrite, is_whole=is_result) as folder:
        result: dict[str, Any] = {"valid": {}, "test": {}, "baselines": {}, "index": None}
        if bundle.has_vectors:
            catalogue = make_catalogue(bundle, dataset, config)
            index, result["index"] = prepare_index(bundle, dataset, catalogue, config)
            with RankWriter(folder / RANKS, config.deepest) as ranks:
                evaluate_queries(bundle, dataset, index, config, result, ranks)
            write_recommendations(folder / TOPK, bundle, dataset, index, config.deepest)
        for split in ("valid", "test"):
            result[split] |= evaluate_feedback(bundle, split)
        result |= {
            "ties": "against",
            "mask_seen": config.mask_seen,
            "candidates": config.candidates,
            "cutoffs": config.cutoffs,
            "model": bundle.manifest.model,
            "refit": bundle.manifest.refit,
            "dataset": dataset.manifest.fingerprint,
        }
        result = {name: value for name, value in result.items() if value != {} or name == "baselines"}
        write_report(folder / REPORT, result, dataset, read_diagnostics(bundle.path))
        write_json(folder / METRICS, result)
    return result


def is_result(path: Path) -> bool:
    """Whether a folder is a finished result."""
    return (path / METRICS).is_file()


def read_diagnostics(bundle: Path) -> dict[str, Any]:
    """The training run's curves and gates beside the bundle; empty where it came without its run."""
    path = bundle.absolute().parent / "diagnostics.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def make_catalogue(bundle: Bundle, dataset: Dataset, config: RetrievalConfig) -> Catalogue:
    """The candidates and their vectors.

    Raises:
        InputError: fewer candidates than the largest cutoff.
    """
    if bundle.manifest.n_items != dataset.manifest.n_items:
        raise InputError(f"a bundle of {dataset.manifest.n_items} items", bundle.manifest.n_items, "export it again")
    vectors = bundle.item_vectors()
    item = np.arange(1, len(vectors) + 1, dtype=np.int32)
    if config.candidates == "clicked":
        item = item[dataset.items(["clicks"])["clicks"].to_numpy() > 0]
    if config.deepest > len(item):
        raise InputError(f"cutoffs up to the {len(item)} candidates", config.deepest, "give smaller cutoffs")
    return Catalogue(item, np.ascontiguousarray(vectors[item - 1]))


def prepare_index(
    bundle: Bundle, dataset: Dataset, catalogue: Catalogue, config: RetrievalConfig
) -> tuple[Index, dict[str, Any]]:
    """Build or load the index, tune it on valid queries, and report its fidelity on test queries.

    The effort for a refit model is that which the model before it needs, which alone has valid queries. An index is kept with what tuning found, so that the next evaluation of the bundle only searches.
    """
    kind = choose_kind(
        config.index, len(catalogue.item), bundle.n_queries("test"), catalogue.vector.shape[1], config.memory_gib
    )
    if kind == "flat":
        index = build_index("flat", catalogue)
        return index, describe_index(index, asdict(measure(index, yardstick(bundle, "test", catalogue))), {})
    made_from = origin(bundle.path / MANIFEST, catalogue)
    stored = Stored(Path(config.index_file), made_from) if config.index_file else None
    stored = stored or Stored.beside(bundle.path, kind, made_from)
    index_found, record = stored.load(catalogue), stored.record()
    if index_found and index_found.kind != kind:
        raise InputError(f"an index of kind {kind}", f"{index_found.kind} in {stored.path}", "name another index_file")
    known = stored.tuned(config.fidelity) if index_found else None
    if index_found and known:
        index_found.set_effort(known["effort"], known["refine"])
        return index_found, describe_index(index_found, known["test"], record | {"curve": known["curve"]})
    selected = valid_bundle(bundle)
    tuned_on = catalogue if selected is bundle else make_catalogue(selected, dataset, config)
    valid = yardstick(selected, "valid", tuned_on)
    if index_found:
        index = index_found
    else:
        spaces = compare_spaces(tuned_on, valid.query)
        index = build_index(kind, catalogue, max(spaces, key=lambda space: spaces[space]))
        norm = np.quantile(norms(catalogue.vector), (0, 0.5, 0.99, 1)).tolist()
        stored.save(index, {"spaces": spaces, "norms": dict(zip(("least", "median", "p99", "largest"), norm, strict=True))})
    tuning = index if selected is bundle else build_index(kind, tuned_on, index.space)
    curve = [{**effort, **asdict(found)} for effort, found in tune(tuning, valid, config.fidelity)]
    index.set_effort(tuning.effort or 1, tuning.refine)
    test = measure(index, yardstick(bundle, "test", catalogue))
    stored.remember(config.fidelity, index, curve, test)
    return index, describe_index(index, asdict(test), stored.record() | {"curve": curve})


def valid_bundle(bundle: Bundle) -> Bundle:
    """The bundle whose valid queries tune an index: of a refit model, the model before the refit."""
    return open_bundle(bundle.path.parent / "bundle-selected") if bundle.manifest.refit else bundle


def yardstick(bundle: Bundle, split: str, catalogue: Catalogue) -> Yardstick:
    """Queries of a split by which the index is judged, searched exactly."""
    return Yardstick.of(catalogue, *sample_queries(bundle, split))


def describe_index(index: Index, test: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What `metrics.json` says of the index; `test` is its fidelity on test queries."""
    told = {"kind": index.kind, **index.parameters, **({"space": index.space} if index.faiss_index else {})}
    told |= {
        f"recall_at_{FIDELITY_K}_vs_exact": test["recall"],
        f"hr_{FIDELITY_K}_vs_exact": test["hr_ratio"],
        f"hr_{FIDELITY_K}_vs_exact_low": test["hr_ratio_low"],
        "exact_hits": test["exact_hits"],
        "sample_queries": test["queries"],
        "queries_per_second": test["queries_per_second"],
        "exact_queries_per_second": test["exact_queries_per_second"],
        "build_seconds": index.build_seconds,
        "tuned_on_valid": record.get("curve", []),
    }
    return told | {name: record[name] for name in ("spaces", "norms") if name in record}


def sample_queries(bundle: Bundle, split: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Vectors and targets of evenly spaced queries of a split.

    Raises:
        InputError: the bundle has none.
    """
    total = bundle.n_queries(split)
    if total == 0:
        raise InputError(f"a bundle with {split} queries", "none", "export the bundle again")
    wanted = np.unique(np.linspace(0, total - 1, min(total, SAMPLE_QUERIES)).astype(np.int64))
    vectors, targets, begin = [], [], 0
    for queries in bundle.queries(split):
        rows = wanted[(wanted >= begin) & (wanted < begin + len(queries))] - begin
        vectors.append(queries.vector[rows])
        targets.append(queries.target[rows])
        begin += len(queries)
    return np.ascontiguousarray(np.concatenate(vectors)), np.concatenate(targets)


def write_recommendations(path: Path, bundle: Bundle, dataset: Dataset, index: Index, k: int) -> None:
    """`topk.parquet`: the best unseen candidates after all kept clicks."""
    item_id = np.concatenate([[0], dataset.items(["item_id"])["item_id"].to_numpy()])
    schema = pa.schema(
        [
            ("user_id", pa.int64()),
            ("items", pa.list_(pa.int32())),
            ("item_ids", pa.list_(pa.int64())),
            ("scores", pa.list_(pa.float32())),
        ]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for queries in bundle.queries("next"):
            score, row = index.search(queries.vector, k + int(queries.n_seen.max(initial=0)))
            listed = np.where(row >= 0, index.catalogue.item[row], 0)
            listed[seen_among(queries, listed)] = 0
            order = np.argsort(listed == 0, axis=1, kind="stable")[:, :k]
            items, scores = np.take_along_axis(listed, order, 1), np.take_along_axis(score, order, 1)
            found = items > 0
            offset = np.concatenate([[0], np.cumsum(found.sum(axis=1))])
            columns = (items[found].astype(np.int32), item_id[items[found]], scores[found].astype(np.float32))
            arrays = [pa.array(queries.user_id), *(lists_array(offset, values) for values in columns)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


# ---------------------------------------------------------------------------------------------
# Feedback


def evaluate_feedback(bundle: Bundle, split: str) -> dict[str, Any]:
    """AUCs and counts of every feedback task of a split."""
    table = bundle.feedback(split)
    if table is None:
        return {}
    out: dict[str, Any] = {}
    task = table["task"].combine_chunks()
    tasks = task.dictionary.to_pylist() if pa.types.is_dictionary(task.type) else sorted(set(task.to_pylist()))
    for name in tasks:
        rows = table.filter(pa.compute.equal(table["task"], name))
        score = rows["score"].to_numpy()
        if not np.isfinite(score).all():
            raise InputError(f"finite {name} scores", "NaN or infinity", "export the bundle again")
        user, clicked, label = (rows[column].to_numpy() for column in ("user_id", "clicked", "label"))
        out |= dict(feedback_metrics(name, user, clicked, label, score))
    return out
