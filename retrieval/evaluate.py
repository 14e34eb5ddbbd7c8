"""The evaluation: a bundle → metrics, recommendations (`topk.parquet`) and a report."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from etl.dataset import Dataset
from etl.runtime.dataset_folder import MANIFEST
from etl.runtime.errors import InputError
from etl.runtime.files import sha256_of, write_json
from etl.runtime.object_store import read_file, refuse_output, staged_output
from etl.runtime.progress import ProgressLine
from retrieval.blend.describe import describe_blend, put_blend
from retrieval.blend.prepare import prepare_blend
from retrieval.blend.ranker import BLEND
from retrieval.bundle import Bundle
from retrieval.bundle_folder import RUN_BUNDLE
from retrieval.config import RetrievalConfig
from retrieval.evaluation import Evaluation, open_inputs
from retrieval.metrics.feedback import feedback_aucs, feedback_metrics
from retrieval.parts import join, parts_folder
from retrieval.popularity import item_rates
from retrieval.rank_part import RANKED_SPLITS, SECONDS, TOPK_SCHEMA, RunParts, run_in_process
from retrieval.rankers.registry import MODEL
from retrieval.ranks_file import RankWriter, read_ranks
from retrieval.repeats import count_repeats
from retrieval.report.examples import examples_of
from retrieval.report.page import write_report
from retrieval.result_folder import METRICS, RANKS, REPORT, RESULT, TOPK
from retrieval.search.index import build_index
from retrieval.search.prepare import index_file_of, kind_of, make_catalogue, prepare_index, valid_bundle
from retrieval.search.tuning import Fidelity
from retrieval.titles import read_titles

RECORDED_OPTIONS = (
    *("index", "fidelity", "index_file", "memory_gib", "candidates", "cutoffs", "blend"),
    *("neighbours", "rules_per_item", "rules_gaps", "titles"),
)
"""Options that `metrics.json` records; `trainer.serve` rebuilds its configuration from them."""
FEEDBACK = "feedback.json"
"""Saved feedback metrics of an unfinished evaluation."""
MANY_QUERIES = 100_000
"""Number of queries from which recommendations take long."""


def evaluate(config: RetrievalConfig, run_parts: RunParts = run_in_process) -> dict[str, Any]:
    """Write the result folder `config.output` atomically, and return its metrics.

    Queries are ranked in parts, with a file each; a killed evaluation resumes with the missing parts.

    Args:
        config: options of the evaluation.
        run_parts: executes all parts, in this process or on several machines.

    Raises:
        InputError: a bundle, dataset or option that the user must fix.
    """
    read = [config.bundle, config.data]
    refuse_output(config.output, RESULT, overwrite=config.overwrite, inputs=read)
    titles = read_titles(config.titles) if config.titles else {}
    dataset, bundle = open_inputs(config)
    repeats = count_repeats(dataset) if config.mask_seen == "auto" else None
    if repeats:
        config = replace(config, mask_seen=repeats.mask_seen)
    with staged_output(config.output, RESULT, overwrite=config.overwrite, inputs=read) as folder:
        result: dict[str, Any] = {"valid": {}, "test": {}, "baselines": {}, "index": None}
        work_folder = parts_folder(config, bundle)
        feedback = saved_feedback(bundle, dataset, work_folder)  # first, to find invalid rows early
        if bundle.has_vectors:
            catalogue = make_catalogue(bundle, dataset, config)
            index, result["index"] = prepare_index(bundle, dataset, catalogue, config)
            evaluation = Evaluation(config, dataset, bundle, index)
            learn(evaluation, work_folder)
            parts = evaluation.parts()
            run_parts(evaluation, [part for part in parts if part.split != "next"], work_folder)
            if bundle.n_queries("next") >= MANY_QUERIES:
                print(test_line(evaluation, work_folder), file=sys.stderr, flush=True)
            run_parts(evaluation, [part for part in parts if part.split == "next"], work_folder)
            collect(evaluation, work_folder, folder, result)
            if repeats:
                print(f"mask_seen={str(config.mask_seen).lower()}: {repeats}", file=sys.stderr, flush=True)
        for name, metrics in feedback.items():
            result[name] |= metrics
        result |= provenance(config, dataset, bundle)
        result = {name: value for name, value in result.items() if value != {} or name == "baselines"}
        run = {name: read_run_file(bundle, f"{name}.json") for name in ("summary", "diagnostics")}
        examples = examples_of(evaluation, work_folder, titles) if bundle.has_vectors else []
        ranks = read_ranks(folder / RANKS) if bundle.has_vectors else None
        result["verdict"] = write_report(folder / REPORT, result, dataset, run, ranks, examples)
        result["files"] = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        write_json(folder / METRICS, result)
    shutil.rmtree(work_folder.parent, ignore_errors=True)
    return result


def test_line(evaluation: Evaluation, work_folder: Path) -> str:
    """One line with the test metrics of each ranker, printed before recommendations are computed."""
    k, metrics = evaluation.config.deepest, evaluation.merged(work_folder, "test")
    values = (
        f"{name} hr@{k} {result[f'hr@{k}']:.4f} ndcg@{k} {result[f'ndcg@{k}']:.4f}"
        for name, result in metrics.items()
        if not name.startswith(f"{BLEND}-")
    )
    return f"test: {'; '.join(values)}"


def provenance(config: RetrievalConfig, dataset: Dataset, bundle: Bundle) -> dict[str, Any]:
    """Inputs and options of a result, for `metrics.json`."""
    return {
        "ties": "against",
        "mask_seen": config.mask_seen,
        "candidates": config.candidates,
        "fidelity": config.fidelity,
        "cutoffs": config.cutoffs,
        "model": bundle.manifest.model,
        "refit": bundle.manifest.refit,
        "transition_terms": bundle.manifest.transition_terms,
        "dataset": dataset.manifest.fingerprint,
        "bundle": sha256_of(bundle.path / MANIFEST),
        "options": {name: getattr(config, name) for name in RECORDED_OPTIONS},
    }


def collect(evaluation: Evaluation, work_folder: Path, folder: Path, result: dict[str, Any]) -> None:
    """Merge the parts: metrics, `ranks.parquet`, and the recommendations in `topk.parquet`."""
    names: dict[str, list[str]] = {"ranks": [], "topk": []}
    for part in evaluation.parts():
        names["topk" if part.split == "next" else "ranks"].append(part.name)
    join((work_folder / name / RANKS for name in names["ranks"]), folder / RANKS, RankWriter.SCHEMA)
    join((work_folder / name / TOPK for name in names["topk"]), folder / TOPK, TOPK_SCHEMA)
    blend = evaluation.blend(work_folder)
    result["blend"] = {} if blend is None else describe_blend(blend.learned)
    if blend:
        blend.learned.write(folder)
    for split in RANKED_SPLITS:
        for name, metrics in evaluation.merged(work_folder, split).items():
            if name == MODEL:
                result[split] |= metrics
            elif name.startswith(BLEND):
                put_blend(result["blend"], name, split, metrics)
            else:
                result["baselines"].setdefault(name, {})[split] = metrics

    if blend:
        result["blend"]["milliseconds"] = milliseconds(evaluation, work_folder)


def learn(evaluation: Evaluation, work_folder: Path) -> None:
    """Fit the blend and save it in the folder of the parts, unless it exists."""
    config, bundle = evaluation.config, evaluation.bundle
    if config.blend == "none" or (
        config.blend == "auto" and not bundle.manifest.refit and not bundle.n_queries("valid")
    ):
        return
    selected = valid_bundle(bundle)
    index = evaluation.index
    if selected is not bundle:  # exact search: used once, for a sample
        index = build_index("flat", make_catalogue(selected, evaluation.dataset, config))
    prepare_blend(evaluation.dataset, selected, index, config, work_folder)


def milliseconds(evaluation: Evaluation, work_folder: Path) -> dict[str, float]:
    """Milliseconds per ranked query by source and blend kind, summed over threads."""
    ranked = [part for part in evaluation.parts() if part.split != "next" and evaluation.ranked(part)]
    total: dict[str, float] = {}
    for part in ranked:
        for name, seconds in json.loads((work_folder / part.name / SECONDS).read_text()).items():
            total[name] = total.get(name, 0.0) + seconds
    queries = max(sum(map(evaluation.ranked, ranked)), 1)
    return {name: 1e3 * seconds / queries for name, seconds in total.items()}


def read_run_file(bundle: Bundle, name: str) -> dict[str, Any]:
    """A JSON file of the training run whose bundle this is; empty if it is missing, or for an average of bundles."""
    if bundle.source.rstrip("/").rpartition("/")[2] != RUN_BUNDLE:  # beside it may be the files of another bundle's run
        return {}
    try:
        return dict(json.loads(read_file(bundle.sibling(name))))
    except (OSError, ValueError):
        return {}


def reopen(config: RetrievalConfig) -> Evaluation:
    """Reopen an evaluation prepared by another process, with its tuned index.

    Raises:
        InputError: this process cannot find the saved index.
    """
    dataset, bundle = open_inputs(config, verify=False)
    catalogue = make_catalogue(bundle, dataset, config)
    kind = kind_of(bundle, catalogue, config)
    if kind == "flat":
        return Evaluation(config, dataset, bundle, build_index("flat", catalogue))
    index_file = index_file_of(bundle, catalogue, config, kind)
    index, known = index_file.load(catalogue), index_file.tuned(config.fidelity)
    if index is None or known is None:
        raise InputError(
            "the prepared index on storage that all machines share", index_file.path, "name index_file there"
        )
    if config.index == "auto" and Fidelity(**known["test"]).is_slower:
        return Evaluation(config, dataset, bundle, build_index("flat", catalogue))
    index.set_search_effort(known["effort"], known["refine"])
    return Evaluation(config, dataset, bundle, index)


# ---------------------------------------------------------------------------------------------
# Feedback


def saved_feedback(bundle: Bundle, dataset: Dataset, folder: Path) -> dict[str, dict[str, Any]]:
    """The result of `evaluate_feedback`, cached in `folder` for resuming."""
    path = folder / FEEDBACK
    if not path.exists():
        write_json(path, evaluate_feedback(bundle, dataset))
    return dict(json.loads(path.read_text()))


def evaluate_feedback(bundle: Bundle, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """AUCs, log-loss, calibration and counts of every feedback task, with one task in memory at a time.

    The baseline is each item's positive rate in train, independent of the user.

    Returns:
        Metrics of `valid` and `test`, and those of `item_rate` in `baselines`, as in `metrics.json`.
    """
    out: dict[str, dict[str, Any]] = {"valid": {}, "test": {}, "baselines": {}}
    tasks = {split: bundle.feedback_tasks(split) for split in RANKED_SPLITS}
    every = list(dict.fromkeys([*tasks["valid"], *tasks["test"]]))
    rates = item_rates(dataset, every) if every else {}
    pairs, line = [(split, task) for split, names in tasks.items() for task in names], ProgressLine()
    for number, (split, task) in enumerate(pairs):
        line.update(f"feedback of {split}: {task}", number, len(pairs), "tasks")
        rows = bundle.feedback(split, task)
        user, item, clicked, label, score = (
            rows[name].to_numpy() for name in ("user_id", "item", "clicked", "label", "score")
        )
        out[split] |= dict(feedback_metrics(task, user, clicked, label, score))
        if task in rates:
            aucs = feedback_aucs(task, user, clicked, label, rates[task][item])
            out["baselines"].setdefault("item_rate", {}).setdefault(split, {}).update(aucs)
    line.close()
    return out
