"""Prepares the index of an evaluation: builds or reopens, tunes and measures it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from etl.dataset import Dataset
from etl.runtime.dataset_folder import MANIFEST
from etl.runtime.errors import InputError
from retrieval.bundle import Bundle, open_bundle
from retrieval.bundle_folder import SELECTED
from retrieval.config import RetrievalConfig
from retrieval.queries import Queries
from retrieval.search.index import Catalogue, Index, build_index, choose_kind, norms
from retrieval.search.index_file import IndexFile, origin
from retrieval.search.tuning import FIDELITY_K, ExactReference, Fidelity, compare_spaces, measure, tune
from retrieval.transitions import read_transitions

SAMPLE_QUERIES = 2_000


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
        raise InputError(f"cutoffs up to the {len(item)} candidates", config.deepest, "choose smaller cutoffs")
    return Catalogue(item, np.ascontiguousarray(vectors[item - 1]), read_transitions(bundle))


def prepare_index(
    bundle: Bundle, dataset: Dataset, catalogue: Catalogue, config: RetrievalConfig
) -> tuple[Index, dict[str, Any]]:
    """The search index, and its entry in `metrics.json`: fidelity and speed on test queries.

    `index=auto` falls back to exact search if its index is slower; an explicit index is kept.
    """
    kind, slower = kind_of(bundle, catalogue, config), None
    if kind != "flat":
        index, known, record = tuned_index(kind, bundle, dataset, catalogue, config)
        test = Fidelity(**known["test"])
        described = describe_index(index, test, record | {"curve": known["curve"]})
        warn_about_index(kind, test, config)
        if not (config.index == "auto" and test.is_slower):
            return index, described
        slower = described
    index = build_index("flat", catalogue)
    described = describe_index(index, measure(index, exact_reference(bundle, "test", catalogue)), {})
    return index, described | ({"slower": slower} if slower else {})


def tuned_index(
    kind: str, bundle: Bundle, dataset: Dataset, catalogue: Catalogue, config: RetrievalConfig
) -> tuple[Index, dict[str, Any], dict[str, Any]]:
    """An index with the search effort tuned on valid queries, the tuning result, and its record.

    A refit model uses the effort tuned for the model before the refit, since only that has valid queries. The index
    is saved with the tuning result, so that the next evaluation of the bundle reuses it.
    """
    index_file = index_file_of(bundle, catalogue, config, kind)
    index, record = index_file.load(catalogue), index_file.record()
    if index and index.kind != kind:
        raise InputError(f"an index of kind {kind}", f"{index.kind} in {index_file.path}", "name another index_file")
    known = index_file.tuned(config.fidelity) if index else None
    if index and known:
        index.set_search_effort(known["effort"], known["refine"])
        return index, known, record
    selected = valid_bundle(bundle)
    tuned_on = catalogue if selected is bundle else make_catalogue(selected, dataset, config)
    valid = exact_reference(selected, "valid", tuned_on)
    if index is None:
        spaces = compare_spaces(tuned_on, valid.query)
        index = build_index(kind, catalogue, max(spaces, key=lambda space: spaces[space]))
        norm = np.quantile(norms(catalogue.vector), (0, 0.5, 0.99, 1)).tolist()
        record = {"spaces": spaces, "norms": dict(zip(("least", "median", "p99", "largest"), norm, strict=True))}
        index_file.save(index, record)
    tuning = index if selected is bundle else build_index(kind, tuned_on, index.space)
    curve = [{**effort, **asdict(result)} for effort, result in tune(tuning, valid, config.fidelity)]
    index.set_search_effort(tuning.search_effort or 1, tuning.refine)
    known = index_file.save_tuning(
        config.fidelity, index, curve, measure(index, exact_reference(bundle, "test", catalogue))
    )
    return index, known, record


def warn_about_index(kind: str, test: Fidelity, config: RetrievalConfig) -> None:
    """Warn if an index misses the requested fidelity on test queries, or is slower than exact search."""
    if not test.reaches(config.fidelity):
        hits = "" if test.hr_ratio is None else f" and HR@{FIDELITY_K} {test.hr_ratio:.4f}"
        print(
            f"warning: on test queries {kind} keeps recall@{FIDELITY_K} {test.recall:.4f} ({test.recall_low:.4f} – "
            f"{test.recall_high:.4f}){hits} of exact search, less than fidelity={config.fidelity}",
            file=sys.stderr,
            flush=True,
        )
    if test.is_slower:
        rates = f"{test.queries_per_second:,.0f} against {test.exact_queries_per_second:,.0f} queries/s"
        instead = "exact search is taken" if config.index == "auto" else "index=flat is exact"
        print(f"warning: {kind} is slower than exact search ({rates}); {instead}", file=sys.stderr, flush=True)


def kind_of(bundle: Bundle, catalogue: Catalogue, config: RetrievalConfig) -> str:
    """The index type selected by the options."""
    size, dimension = catalogue.vector.shape
    return choose_kind(config.index, size, bundle.n_queries("test"), dimension, config.memory_gib)


def index_file_of(bundle: Bundle, catalogue: Catalogue, config: RetrievalConfig, kind: str) -> IndexFile:
    """Path of the index file."""
    made_from = origin(bundle.path / MANIFEST, catalogue)
    if config.index_file:
        return IndexFile(Path(config.index_file), made_from)
    return IndexFile.for_bundle(bundle.path, kind, made_from)


def valid_bundle(bundle: Bundle) -> Bundle:
    """The bundle whose valid queries tune an index: for a refit model, that of the model before the refit."""
    return open_bundle(bundle.sibling(SELECTED)) if bundle.manifest.refit else bundle


def exact_reference(bundle: Bundle, split: str, catalogue: Catalogue) -> ExactReference:
    """Exact search results for a sample of a split's queries."""
    queries = sample_queries(bundle, split)
    vector = np.ascontiguousarray(queries.vector)
    return ExactReference.of(catalogue, vector, queries.target, catalogue.transition_term(queries))


def describe_index(index: Index, test: Fidelity, record: dict[str, Any]) -> dict[str, Any]:
    """The index's entry in `metrics.json`; `test` is its fidelity on test queries."""
    described = {"kind": index.kind, **index.parameters, **({"space": index.space} if index.faiss_index else {})}
    described |= {
        f"recall_at_{FIDELITY_K}_vs_exact": test.recall,
        f"recall_at_{FIDELITY_K}_vs_exact_interval": [test.recall_low, test.recall_high],
        f"hr_{FIDELITY_K}_vs_exact": test.hr_ratio,
        f"hr_{FIDELITY_K}_vs_exact_low": test.hr_ratio_low,
        "exact_hits": test.exact_hits,
        "sample_queries": test.queries,
        "queries_per_second": test.queries_per_second,
        "exact_queries_per_second": test.exact_queries_per_second,
        "build_seconds": index.build_seconds,
        "tuned_on_valid": record.get("curve", []),
    }
    return described | {name: record[name] for name in ("spaces", "norms") if name in record}


def sample_queries(bundle: Bundle, split: str) -> Queries:
    """Evenly spaced queries of a split.

    Raises:
        InputError: the bundle has none.
    """
    batches = bundle.sample_queries(split, SAMPLE_QUERIES)
    if not batches:
        raise InputError(f"a bundle with {split} queries", "none", "export the bundle again")
    return Queries.joined(batches)
