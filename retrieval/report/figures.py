"""The figures of the report: title, SVG and note of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from etl.dataset import Dataset
from retrieval.metrics.ranking import main_cutoff
from retrieval.report import charts


def figures(result: dict[str, Any], dataset: Dataset, diagnostics: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Title, SVG and note of each figure."""
    yield from _training_figures(diagnostics.get("curves", {}))
    yield from _segment_figures(result)
    yield from _trust_figures(result)
    if diagnostics.get("gates"):
        yield _gate_figure(diagnostics["gates"])
    yield from _dataset_figures(dataset)


def _training_figures(curves: dict[str, list[tuple[int, float]]]) -> Iterable[tuple[str, str, str]]:
    """Validation metrics and training losses by epoch, if available."""
    losses = {n.removeprefix("train/loss/"): v for n, v in curves.items() if n.startswith("train/loss/")}
    ranking = {
        n.removeprefix("valid/").replace("hr", "HR").replace("ndcg", "NDCG"): v
        for n, v in curves.items()
        if n in ("valid/hr@20", "valid/ndcg@20")
    }
    if ranking:
        yield (
            "Validation",
            charts.curves(ranking, "share"),
            "Valid clicks after each epoch; training keeps the best NDCG@20.",
        )
    if losses:
        shares = {task: [(epoch, loss / pairs[0][1]) for epoch, loss in pairs] for task, pairs in losses.items()}
        last = ", ".join(f"{task} {pairs[-1][1]:.3f}" for task, pairs in losses.items())
        yield (
            "Training loss",
            charts.curves(shares, "share of the first epoch's"),
            f"Mean over the epoch, by task; in the last epoch {last} nats.",
        )


def _gate_figure(gates: dict[str, Any]) -> tuple[str, str, str]:
    """Expert weights by task, and how even each gate is."""
    tasks, weights = list(gates["mean_weight"]), np.array(list(gates["mean_weight"].values()))
    max_entropy = np.log(weights.shape[1])
    rows = [f"{task} ({gates['entropy_nats'][task] / max_entropy:.0%})" if max_entropy else task for task in tasks]
    return (
        "Gates",
        charts.heat_map(rows, weights, "expert"),
        "Mean share of each expert in a task's mix; in brackets the gate's entropy as a share of an even gate's.",
    )


def _dataset_figures(dataset: Dataset) -> Iterable[tuple[str, str, str]]:
    """Lengths of the sessions, and clicks by item."""
    length, count = session_lengths(dataset)
    yield (
        "Session length",
        charts.histogram(length, count, "retained clicks", "sessions"),
        (f"At most {dataset.manifest.max_clicks} clicks of a user are retained."),
    )
    clicks = dataset.items(["train_clicks"])["train_clicks"].to_numpy()
    yield (
        "Popularity",
        charts.popularity(clicks),
        (f"{int((clicks == 0).sum()):,} of {len(clicks):,} items have no train click."),
    )


SEGMENTS = (
    ("session_length", "session length", "retained clicks of the session", "Sessions"),
    (
        "target_popularity",
        "popularity of the target",
        "tenth of the train clicks, 1 = the most clicked items",
        "Targets",
    ),
)


def _segment_figures(result: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """HR of the model and of popularity by query segment."""
    for kind, title, x, what in SEGMENTS:
        segments = result.get("test", {}).get(kind)
        if not segments:
            continue
        key = f"hr@{main_cutoff(result['cutoffs'])}"
        base = result["baselines"]["popularity"]["test"][kind]
        series = {
            result["model"]: [metrics[key] for metrics in segments.values()],
            "popularity": [base[name][key] for name in segments],
        }
        queries = ", ".join(f"{name}: {s['queries']:,}" for name, s in segments.items())
        chart = charts.bars(list(segments), series, x, key.upper())
        yield f"{key.upper()} by {title}", chart, f"{what}: {queries}."


def _trust_figures(result: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Index recall against speed, and calibration of probabilities."""
    index, test = result.get("index") or {}, result.get("test", {})
    tried = [(t["queries_per_second"], t["recall"]) for t in index.get("tuned_on_valid", [])]
    if tried:
        note = "One point for each effort tried on valid queries; dotted, the fidelity asked for."
        yield "Fidelity of the index", charts.fidelity(tried, result["fidelity"]), note
    tasks = {
        name.removeprefix("calibration/"): (curve["predicted"], curve["observed"])
        for name, curve in test.items()
        if name.startswith("calibration/") and any(curve["observed"])
    }
    if tasks:
        errors = ", ".join(f"{task} {test[f'calibration_error/{task}']:.4f}" for task in tasks)
        note = f"Tenths of the rows by score, on test. Mean difference of predicted and observed: {errors}."
        yield "Calibration", charts.calibration(tasks), note


def session_lengths(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Histogram of retained clicks per session: distinct values and counts."""
    total = np.zeros(dataset.manifest.max_clicks + 1, np.int64)
    for entry in dataset.session_files:
        clicks = pq.read_table(dataset.file(entry.path), columns=["n_clicks"])["n_clicks"].to_numpy()
        total += np.bincount(np.minimum(clicks, len(total) - 1), minlength=len(total))
    length = np.flatnonzero(total)
    return length, total[length]
