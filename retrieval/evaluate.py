"""The whole evaluation on one page: a bundle → metrics, recommendations and a report."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.contract import Dataset
from etl.dataset_folder import MANIFEST
from etl.folder import InputError, write_json
from etl.remote import published, read_file, refuse_output
from retrieval.baselines import item_rates
from retrieval.blend.describe import describe_blend, put_blend
from retrieval.blend.prepare import prepare_blend
from retrieval.blend.ranker import BLEND
from retrieval.bundle import Bundle, open_bundle
from retrieval.config import RetrievalConfig
from retrieval.index import (
    FIDELITY_K,
    Catalogue,
    Fidelity,
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
from retrieval.part_files import CLICKS_AFTER_QUERY, SECONDS, TOPK_SCHEMA
from retrieval.parts import (
    Evaluation,
    RunParts,
    join,
    open_inputs,
    parts_folder,
    run_here,
)
from retrieval.ranking import MODEL, RankWriter
from retrieval.repeats import count_repeats
from retrieval.report import examples_of, write_report
from retrieval.result_folder import METRICS, RANKS, REPORT, RESULT, TOPK
from retrieval.stored import Stored, origin

SAMPLE_QUERIES = 2_000


def evaluate(config: RetrievalConfig, run_parts: RunParts = run_here) -> dict[str, Any]:
    """Make the result folder `config.output`, whole or not at all, and return its metrics.

    The queries are ranked in parts, a file each; a killed evaluation goes on with those that are left.

    Args:
        config: what to evaluate, and how.
        run_parts: sees to it that every part is made: in this process, or on many machines.

    Raises:
        InputError: a bundle, dataset or option that the user must mend.
    """
    read = [config.bundle, config.data]
    refuse_output(config.output, RESULT, overwrite=config.overwrite, inputs=read)
    dataset, bundle = open_inputs(config)
    repeats = count_repeats(dataset) if config.mask_seen == "auto" else None
    if repeats:
        config = replace(config, mask_seen=repeats.mask_seen)
    with published(config.output, RESULT, overwrite=config.overwrite, inputs=read) as folder:
        result: dict[str, Any] = {"valid": {}, "test": {}, "baselines": {}, "index": None}
        feedback = evaluate_feedback(bundle, dataset)  # first: broken rows should not be met after hours of ranking
        if bundle.has_vectors:
            catalogue = make_catalogue(bundle, dataset, config)
            index, result["index"] = prepare_index(bundle, dataset, catalogue, config)
            evaluation, parts = Evaluation(config, dataset, bundle, index), parts_folder(config, bundle)
            learn(evaluation, parts)
            run_parts(evaluation, evaluation.parts(), parts)
            collect(evaluation, parts, folder, result)
            if repeats:
                print(f"mask_seen={str(config.mask_seen).lower()}: {repeats}", file=sys.stderr, flush=True)
        for name, metrics in feedback.items():
            result[name] |= metrics
        result |= {
            "ties": "against",
            "mask_seen": config.mask_seen,
            "candidates": config.candidates,
            "fidelity": config.fidelity,
            "cutoffs": config.cutoffs,
            "model": bundle.manifest.model,
            "refit": bundle.manifest.refit,
            "dataset": dataset.manifest.fingerprint,
        }
        result = {name: value for name, value in result.items() if value != {} or name == "baselines"}
        examples = []
        if bundle.has_vectors:
            examples = examples_of(folder / TOPK, next(bundle.queries("next"), None), evaluation.item_id)
        write_report(folder / REPORT, result, dataset, read_diagnostics(bundle), examples)
        result["files"] = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        write_json(folder / METRICS, result)
    if bundle.has_vectors:
        shutil.rmtree(parts.parent, ignore_errors=True)
    return result


def collect(evaluation: Evaluation, parts: Path, folder: Path, result: dict[str, Any]) -> None:
    """Put what the parts found into the result's metrics and files."""
    names: dict[str, list[str]] = {"ranks": [], "topk": []}
    for part in evaluation.parts():
        names["topk" if part.split == "next" else "ranks"].append(part.name)
    join((parts / name / RANKS for name in names["ranks"]), folder / RANKS, RankWriter.SCHEMA)
    join((parts / name / TOPK for name in names["topk"]), folder / TOPK, TOPK_SCHEMA)
    blend = evaluation.blend(parts)
    result["blend"] = {} if blend is None else describe_blend(blend.learned)
    for split in CLICKS_AFTER_QUERY:
        for name, metrics in evaluation.merged(parts, split).items():
            if name == MODEL:
                result[split] |= metrics
            elif name.startswith(BLEND):
                put_blend(result["blend"], name, split, metrics)
            else:
                result["baselines"].setdefault(name, {})[split] = metrics

    if blend:
        result["blend"]["milliseconds"] = milliseconds(evaluation, parts)


def learn(evaluation: Evaluation, parts: Path) -> None:
    """Learn the blend into the folder of the parts, unless it is there."""
    config, bundle = evaluation.config, evaluation.bundle
    if config.blend == "none" or (
        config.blend == "auto" and not bundle.manifest.refit and not bundle.n_queries("valid")
    ):
        return
    selected = valid_bundle(bundle)
    index = evaluation.index
    if selected is not bundle:  # exact: it is searched once, for a sample
        index = build_index("flat", make_catalogue(selected, evaluation.dataset, config))
    prepare_blend(evaluation.dataset, selected, index, config, parts)


def milliseconds(evaluation: Evaluation, parts: Path) -> dict[str, float]:
    """Milliseconds a ranked query of each source and of what joins them, added up over threads."""
    ranked = [part for part in evaluation.parts() if part.split != "next" and part.rows]
    total: dict[str, float] = {}
    for part in ranked:
        for name, seconds in json.loads((parts / part.name / SECONDS).read_text()).items():
            total[name] = total.get(name, 0.0) + seconds
    queries = max(sum(part.rows for part in ranked), 1)
    return {name: 1e3 * seconds / queries for name, seconds in total.items()}


def read_diagnostics(bundle: Bundle) -> dict[str, Any]:
    """The training run's curves and gates beside the bundle; empty where it came without its run."""
    try:
        return dict(json.loads(read_file(bundle.beside("diagnostics.json"))))
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
    """The index that is searched, and what `metrics.json` says of it: its fidelity and speed on test queries.

    `index=auto` searches exactly where the index that it chose is slower; an index that was named is kept.
    """
    kind, slower = kind_of(bundle, catalogue, config), None
    if kind != "flat":
        index, known, record = tuned_index(kind, bundle, dataset, catalogue, config)
        test = Fidelity(**known["test"])
        described = describe_index(index, test, record | {"curve": known["curve"]})
        warn_of_index(kind, test, config)
        if not (config.index == "auto" and test.is_slower):
            return index, described
        slower = described
    index = build_index("flat", catalogue)
    described = describe_index(index, measure(index, yardstick(bundle, "test", catalogue)), {})
    return index, described | ({"slower": slower} if slower else {})


def tuned_index(
    kind: str, bundle: Bundle, dataset: Dataset, catalogue: Catalogue, config: RetrievalConfig
) -> tuple[Index, dict[str, Any], dict[str, Any]]:
    """An index with the effort that valid queries need, what tuning found, and its record.

    The effort for a refit model is that which the model before it needs, which alone has valid queries. An index
    is kept with what tuning found, so that the next evaluation of the bundle only searches.
    """
    stored = place_of(bundle, catalogue, config, kind)
    index, record = stored.load(catalogue), stored.record()
    if index and index.kind != kind:
        raise InputError(f"an index of kind {kind}", f"{index.kind} in {stored.path}", "name another index_file")
    known = stored.tuned(config.fidelity) if index else None
    if index and known:
        index.set_effort(known["effort"], known["refine"])
        return index, known, record
    selected = valid_bundle(bundle)
    tuned_on = catalogue if selected is bundle else make_catalogue(selected, dataset, config)
    valid = yardstick(selected, "valid", tuned_on)
    if index is None:
        spaces = compare_spaces(tuned_on, valid.query)
        index = build_index(kind, catalogue, max(spaces, key=lambda space: spaces[space]))
        norm = np.quantile(norms(catalogue.vector), (0, 0.5, 0.99, 1)).tolist()
        record = {"spaces": spaces, "norms": dict(zip(("least", "median", "p99", "largest"), norm, strict=True))}
        stored.save(index, record)
    tuning = index if selected is bundle else build_index(kind, tuned_on, index.space)
    curve = [{**effort, **asdict(found)} for effort, found in tune(tuning, valid, config.fidelity)]
    index.set_effort(tuning.effort or 1, tuning.refine)
    known = stored.remember(config.fidelity, index, curve, measure(index, yardstick(bundle, "test", catalogue)))
    return index, known, record


def warn_of_index(kind: str, test: Fidelity, config: RetrievalConfig) -> None:
    """Say where an index misses on test queries what was asked for, or is slower than exact search."""
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
    """The kind of index that the options stand for."""
    size, dimension = catalogue.vector.shape
    return choose_kind(config.index, size, bundle.n_queries("test"), dimension, config.memory_gib)


def place_of(bundle: Bundle, catalogue: Catalogue, config: RetrievalConfig, kind: str) -> Stored:
    """Where the index is kept."""
    made_from = origin(bundle.path / MANIFEST, catalogue)
    if config.index_file:
        return Stored(Path(config.index_file), made_from)
    return Stored.beside(bundle.path, kind, made_from)


def reopen(config: RetrievalConfig) -> Evaluation:
    """The evaluation that another process has prepared: its index is loaded with the effort that tuning found.

    Raises:
        InputError: that process kept no index where this one can read it.
    """
    dataset, bundle = open_inputs(config, verify=False)
    catalogue = make_catalogue(bundle, dataset, config)
    kind = kind_of(bundle, catalogue, config)
    if kind == "flat":
        return Evaluation(config, dataset, bundle, build_index("flat", catalogue))
    stored = place_of(bundle, catalogue, config, kind)
    index, known = stored.load(catalogue), stored.tuned(config.fidelity)
    if index is None or known is None:
        raise InputError("the prepared index on storage that all machines share", stored.path, "name index_file there")
    if config.index == "auto" and Fidelity(**known["test"]).is_slower:
        return Evaluation(config, dataset, bundle, build_index("flat", catalogue))
    index.set_effort(known["effort"], known["refine"])
    return Evaluation(config, dataset, bundle, index)


def valid_bundle(bundle: Bundle) -> Bundle:
    """The bundle whose valid queries tune an index: of a refit model, the model before the refit."""
    return open_bundle(bundle.beside("bundle-selected")) if bundle.manifest.refit else bundle


def yardstick(bundle: Bundle, split: str, catalogue: Catalogue) -> Yardstick:
    """Queries of a split by which the index is judged, searched exactly."""
    return Yardstick.of(catalogue, *sample_queries(bundle, split))


def describe_index(index: Index, test: Fidelity, record: dict[str, Any]) -> dict[str, Any]:
    """What `metrics.json` says of the index; `test` is its fidelity on test queries."""
    told = {"kind": index.kind, **index.parameters, **({"space": index.space} if index.faiss_index else {})}
    told |= {
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


# ---------------------------------------------------------------------------------------------
# Feedback


def evaluate_feedback(bundle: Bundle, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """AUCs, log-loss, calibration and counts of every feedback task, a task in memory at a time.

    Beside the model stands each item's own rate in train, which knows no user; the sessions are read for it once.

    Returns:
        Metrics of `valid` and `test`, and in `baselines` those of `item_rate`, as in `metrics.json`.
    """
    out: dict[str, dict[str, Any]] = {"valid": {}, "test": {}, "baselines": {}}
    tasks = {split: bundle.feedback_tasks(split) for split in ("valid", "test")}
    every = list(dict.fromkeys([*tasks["valid"], *tasks["test"]]))
    rates = item_rates(dataset, every) if every else {}
    for split, task in ((split, task) for split, names in tasks.items() for task in names):
        rows = bundle.feedback(split, task)
        user, item, clicked, label, score = (
            rows[name].to_numpy() for name in ("user_id", "item", "clicked", "label", "score")
        )
        out[split] |= dict(feedback_metrics(task, user, clicked, label, score))
        if task in rates:
            found = dict(feedback_metrics(task, user, clicked, label, rates[task][item]))
            aucs = {name: value for name, value in found.items() if "auc/" in name}
            out["baselines"].setdefault("item_rate", {}).setdefault(split, {}).update(aucs)
    return out
