"""Results of the trials: one row per variant and seed, differences to the reference, and sentences on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.study.experiment import Experiment, reference
from cluster.study.logs import Log
from cluster.study.trials import Cell, StudyTrial
from retrieval.metrics.significance import (
    SIGNIFICANCE_LEVEL,
    format_p,
    gains,
    holm,
    interval,
    matched_ranks,
    signed_rank,
)
from retrieval.ranks_file import read_ranks
from retrieval.result_folder import RANKS

BY_RANK = ("hr@", "ndcg@", "mrr@")


def test_metrics(cell: Cell) -> dict[str, Any]:
    """Test metrics of a cell's ranker; empty for a failed trial."""
    if cell.trial.failure:
        return {}
    result, ranker = cell.trial.metrics, cell.variant.ranker
    if ranker == "model":
        return dict(result.get("test", {}))
    if ranker == "blend":
        return dict(result.get("blend", {}).get("test", {}))
    return dict(result["baselines"].get(ranker, {}).get("test", {}))


def row_of(cell: Cell) -> dict[str, Any]:
    """A row of the results table."""
    trial, failure = cell.trial, cell.trial.failure
    row: dict[str, Any] = {
        "experiment": cell.experiment.name,
        "data": cell.data.log.name,
        "variant": cell.variant.name,
        "seed": trial.seed,
        "state": "failed" if failure else "finished",
        "error": failure or None,
    }
    if failure:
        return row
    test = test_metrics(cell)
    row |= {f"test/{name}": test.get(name) for name in cell.experiment.metrics}
    if cell.variant.ranker == "model":
        summary = trial.summary
        row |= {f"valid/{name}": value for name, value in summary["valid"].items()}
        row |= {
            "parameters": summary["parameters"]["total"],
            "flops_per_example": summary["flops_per_example"],
            "examples_per_second": summary["examples_per_second"],
            "seconds": summary["seconds"],
            "best_epoch": summary["best_epoch"],
        }
        row["queries_per_second"] = (trial.metrics.get("index") or {}).get("queries_per_second")
    return row | {"run": trial.run.name}


@dataclass(frozen=True)
class Estimate:
    """A metric of a variant over its seeds, and its difference to the reference.

    Attributes:
        mean, spread: over seeds; the spread is None with a single seed.
        difference, low, high: difference to the reference with 95 % interval; None without one. Over users for
            rank metrics, over seeds for AUCs.
        p: two-sided p-value, Holm-corrected over the experiment on this log.
        share_of_best: share of the best possible score; None for real logs.
    """

    mean: float | None
    spread: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    share_of_best: float | None = None


Estimates = dict[tuple[str, str], Estimate]
"""Estimates by variant and metric."""


class LogResult(NamedTuple):
    """The cells of an experiment on a log, and the estimates from them."""

    experiment: Experiment
    log: Log
    cells: list[Cell]
    estimates: Estimates


Results = dict[tuple[str, str], LogResult]
"""Results by the names of experiment and log."""


def ranks_of(trial: StudyTrial, ranker: str) -> pa.Table:
    """Test ranks of a ranker in the trial's result: `user_id` and `rank`."""
    return read_ranks(trial.result / RANKS, rankers=[ranker])[ranker]


def results_of(cells: Sequence[Cell]) -> Results:
    """The cells by experiment and log, with their estimates."""
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.experiment.name, cell.data.log.name), []).append(cell)
    return {
        key: LogResult(
            group[0].experiment,
            group[0].data.log.original,
            group,
            estimates_of(group[0].experiment, group, best_possible(group)),
        )
        for key, group in grouped.items()
    }


def best_possible(cells: Sequence[Cell]) -> dict[str, float]:
    """Best possible test scores, if all variants share the generated log."""
    paths = {cell.data.path: cell.data for cell in cells}
    return next(iter(paths.values())).best_possible if len(paths) == 1 else {}


def estimates_of(experiment: Experiment, cells: Sequence[Cell], best: dict[str, float]) -> Estimates:
    """Estimates of every variant and metric of an experiment on one log."""
    by_variant: dict[str, list[Cell]] = {}
    for cell in cells:
        by_variant.setdefault(cell.variant.name, []).append(cell)
    out: Estimates = {}
    tests: list[tuple[tuple[str, str], float]] = []
    for variant in experiment.variants:
        mine = by_variant.get(variant.name, [])
        other = by_variant.get(reference(experiment, variant) or "", [])
        ranks = cache(partial(user_ranks, mine, other))  # read at most once, for rank metrics
        for metric in experiment.metrics:
            estimate, p = _estimate(mine, other, metric, best.get(metric), ranks)
            out[variant.name, metric] = estimate
            if p is not None:
                tests.append(((variant.name, metric), p))
    for (key, _), p in zip(tests, holm([p for _, p in tests]).tolist() if tests else [], strict=True):
        out[key] = Estimate(**{**vars(out[key]), "p": p})
    return out


def _estimate(
    mine: Sequence[Cell], other: Sequence[Cell], metric: str, best: float | None, ranks: Callable[[], Sides]
) -> tuple[Estimate, float | None]:
    """An estimate, and the uncorrected p-value of its difference."""
    values = [v for v in (test_metrics(cell).get(metric) for cell in mine) if v is not None]
    if not values:
        return Estimate(None), None
    mean, spread = fmean(values), stdev(values) if len(values) > 1 else None
    share = mean / best if best else None
    if not other or any(cell.trial.failure for cell in (*mine, *other)):
        return Estimate(mean, spread, share_of_best=share), None
    if metric.startswith(BY_RANK):
        first, second = (np.mean([gains(rank, metric) for rank in side], axis=0) for side in ranks())
        low, high = interval(first - second)
        return Estimate(mean, spread, float((first - second).mean()), low, high, share_of_best=share), signed_rank(
            first, second
        )
    return _over_seeds(mine, other, metric, Estimate(mean, spread, share_of_best=share))


Sides = tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.int64]]]


def user_ranks(mine: Sequence[Cell], other: Sequence[Cell]) -> Sides:
    """Ranks of the users ranked in all trials, sorted by user, for each seed of both sides."""
    ranks = matched_ranks([ranks_of(cell.trial, cell.variant.ranker) for cell in (*mine, *other)])
    return ranks[: len(mine)], ranks[len(mine) :]


def _over_seeds(
    mine: Sequence[Cell], other: Sequence[Cell], metric: str, estimate: Estimate
) -> tuple[Estimate, float | None]:
    """The difference of an AUC paired by seed, with Student's t interval; a single seed has no interval."""
    from scipy import stats

    others = {cell.trial.seed: test_metrics(cell).get(metric) for cell in other}
    pairs = [(test_metrics(cell).get(metric), others.get(cell.trial.seed)) for cell in mine]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences:
        return estimate, None
    mean = fmean(differences)
    if len(differences) < 2:
        return Estimate(estimate.mean, estimate.spread, mean, share_of_best=estimate.share_of_best), None
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * stdev(differences) / len(differences) ** 0.5
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if stdev(differences) > 0 else None
    return Estimate(
        estimate.mean, estimate.spread, mean, mean - half, mean + half, share_of_best=estimate.share_of_best
    ), p


def label(metric: str) -> str:
    """Display name of a metric.

    >>> label("ndcg@20"), label("auc/like_given_click")
    ('NDCG@20', 'AUC like given click')
    """
    name, slash, task = metric.partition("/")
    return f"{name.upper()} {task.replace('_', ' ')}" if slash else metric.upper()


def with_interval(estimate: Estimate) -> str:
    """Format a difference with its interval and p-value.

    >>> with_interval(Estimate(0.2, None, 0.01, -0.001, 0.02, 0.04)), with_interval(Estimate(0.2, None, 0.01))
    ('+0.0100 [-0.0010, +0.0200], p 0.04', '+0.0100 (one seed)')
    """
    if estimate.difference is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.difference:+.4f} (one seed)"
    p = "" if estimate.p is None else f", p {format_p(estimate.p)}"
    return f"{estimate.difference:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]{p}"


def is_sure(estimate: Estimate) -> bool:
    """Whether a difference is statistically significant."""
    return estimate.p is not None and estimate.p < SIGNIFICANCE_LEVEL


def answer(experiment: Experiment, metric: str, estimates: Estimates) -> str:
    """A metric's findings in sentences: the best variant, and which differ significantly from their reference."""
    means = {name: e.mean for (name, m), e in estimates.items() if m == metric and e.mean is not None}
    if not means:
        return ""
    top = max(means, key=lambda name: means[name])
    groups: dict[tuple[str, str], list[str]] = {}
    for variant in experiment.variants:
        estimate, against = estimates[variant.name, metric], reference(experiment, variant)
        if estimate.difference is None or against is None:
            continue
        if is_sure(estimate):
            beginning = "Better than" if estimate.difference > 0 else "Worse than"
            text = f"{variant.name} {with_interval(estimate)}"
        elif estimate.p is not None:
            beginning, text = "No difference beyond chance from", variant.name
        else:
            beginning, text = "Not tested against", f"{variant.name} {estimate.difference:+.4f}"
        groups.setdefault((beginning, against), []).append(text)
    said = [
        f"{beginning} {against}: {'; '.join(group)}"
        for (beginning, against), group in sorted(groups.items(), key=lambda entry: BEGINNINGS.index(entry[0][0]))
    ]
    return ". ".join([f"{label(metric)} is highest for {top} ({means[top]:.4f})", *said]) + "."


BEGINNINGS = ("Better than", "Worse than", "No difference beyond chance from", "Not tested against")
"""Beginnings of the sentences on variants with the same reference, in this order."""
