"""The summary of the report: sentences generated from its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from etl.runtime.progress import duration
from retrieval.metrics.ranking import main_cutoff
from retrieval.metrics.significance import (
    SIGNIFICANCE_LEVEL,
    Difference,
    compare,
    format_p,
    gains,
    interval,
    matched_ranks,
)
from retrieval.rankers.registry import MODEL

Ranks = Mapping[str, pa.Table]
"""Test ranks by ranker, tables of `user_id` and `rank`, by user."""
EVEN = 0.95
"""A gate with at least this share of the maximum entropy is nearly uniform."""
COUNTED_SHARE = 0.05
"""Share of test transitions counted in train from which counted transitions are recommended."""


@dataclass(frozen=True)
class Verdict:
    """The summary of a result.

    Attributes:
        answer: the blend, or the model, compared with the best baseline on the queries ranked by both.
        cost: parameters, training time, queries per second.
        notes: other findings.
        advice: recommended next steps.
    """

    answer: str
    cost: str
    notes: list[str]
    advice: list[str]


def best_baseline(result: dict[str, Any], k: int) -> str:
    """The baseline with the highest HR@k on test (chosen in hindsight)."""
    baselines = {n: m["test"][f"hr@{k}"] for n, m in result["baselines"].items() if f"hr@{k}" in m.get("test", {})}
    return max(baselines, key=lambda name: baselines[name])


@dataclass(frozen=True)
class Matched:
    """HR@k of the blend or the model (`own`) and of a baseline, over the queries ranked by both."""

    own: float
    baseline: float
    difference: Difference
    queries: int

    @classmethod
    def of(cls, ranks: Ranks, own: str, baseline: str, k: int) -> Matched:
        """From the ranks of both."""
        first, second = matched_ranks([ranks[own], ranks[baseline]])
        name = f"hr@{k}"
        own_share, baseline_share = (float(gains(rank, name).mean()) for rank in (first, second))
        return cls(own_share, baseline_share, compare(first, second, name), len(first))


def hit_interval(ranks: Ranks, ranker: str, k: int) -> tuple[float, float]:
    """95 % bootstrap interval of HR@k on test."""
    return interval(gains(ranks[ranker]["rank"].to_numpy(), f"hr@{k}"))


def verdict(result: dict[str, Any], ranks: Ranks, summary: dict[str, Any], diagnostics: dict[str, Any]) -> Verdict:
    """Summarise a result of a session model.

    Args:
        result: content of `metrics.json`.
        ranks: test ranks from `read_ranks`.
        summary, diagnostics: files of the training run; may be empty.
    """
    k = main_cutoff(result["cutoffs"])
    own = "blend" if result.get("blend") else MODEL
    baseline = best_baseline(result, k)
    matched = Matched.of(ranks, own, baseline, k)
    notes = [*_blend_notes(result, k), *_segment_notes(result, k), *_gate_notes(diagnostics)]
    advice = _advice(result, matched.difference)
    return Verdict(_answer(result, own, baseline, matched, k), _cost(result, summary), notes, advice)


def _answer(result: dict[str, Any], own: str, baseline: str, matched: Matched, k: int) -> str:
    against = matched.difference
    used = [source for source, weight in result["blend"]["weights"].items() if weight] if own == "blend" else [MODEL]
    name = _name_of(used, str(result["model"]))
    every = result["test"].get("queries", matched.queries)
    sample = f" of {matched.queries:,} sampled queries" if matched.queries < every else ""
    sentence = (
        f"{matched.own:.1%} of the next clicks{sample} are ranked among the first {k} by {name}; the best "
        f"baseline, {baseline}, finds {matched.baseline:.1%}: "
        f"{100 * against.difference:+.1f} points [{100 * against.low:+.1f}, {100 * against.high:+.1f}], "
        f"p {format_p(against.p)}."
    )
    if against.p >= SIGNIFICANCE_LEVEL:
        excluded = against.low > 0 or against.high < 0
        few = " Few queries differ, for which the interval is too narrow; the exact test counts." if excluded else ""
        return f"{sentence}{few} These queries do not tell which is better."
    return sentence if against.difference > 0 else sentence + " The baseline is better."


def _name_of(used: list[str], model: str) -> str:
    """What recommends: sources with a weight.

    >>> _name_of(["model"], "gru4rec"), _name_of(["stan"], "gru4rec"), _name_of(["markov", "stan"], "gru4rec")
    ('the model gru4rec', 'stan', 'the blend of counted sources')
    """
    if len(used) == 1:
        return f"the model {model}" if used == [MODEL] else used[0]
    return "the blend of the model and counted sources" if MODEL in used else "the blend of counted sources"


def _cost(result: dict[str, Any], summary: dict[str, Any]) -> str:
    phrases = []
    if summary:
        phrases.append(f"{summary['parameters']['total']:,} parameters")
        rate = summary.get("examples_per_second")
        trained = f"trained in {duration(summary['seconds'])}"
        phrases.append(trained + (f" at {rate:,.0f} events/s" if rate else ""))
        phrases.append(f"seed {summary['seed']}")
    index = result.get("index") or {}
    if index.get("queries_per_second"):
        phrases.append(f"{index['queries_per_second']:,.0f} queries/s by the index ({index['kind']})")
    spent = result.get("blend", {}).get("milliseconds")
    if spent:
        phrases.append(f"{sum(spent.values()):.2f} ms a query for the blend")
    return "; ".join(phrases) + "." if phrases else ""


def _blend_notes(result: dict[str, Any], k: int) -> list[str]:
    blend = result.get("blend")
    if not blend:
        return []
    used = {name: weight for name, weight in blend["weights"].items() if weight}
    if len(used) == 1 and blend["kind"] == "sum":
        return [f"The blend takes {next(iter(used))} alone: on users that nothing was learned from no weights beat it."]
    alone, joined = result["test"][f"hr@{k}"], blend["test"][f"hr@{k}"]
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in sorted(used.items(), key=lambda pair: -pair[1]))
    return [f"The model alone finds {alone:.1%}, the blend ({blend['kind']}) {joined:.1%}. Weights: {weights}."]


def _segment_notes(result: dict[str, Any], k: int) -> list[str]:
    """Segments in which popularity is better than the model."""
    own = result["test"].get("target_popularity", {})
    base = result["baselines"]["popularity"]["test"].get("target_popularity", {})
    better = [name for name in own if base.get(name) and base[name][f"hr@{k}"] > own[name][f"hr@{k}"]]
    if not better:
        return []
    tenths = f"tenth {better[0]}" if len(better) == 1 else f"tenths {', '.join(better)}"
    return [
        f"Of targets in popularity {tenths} (1 = the most clicked items), plain popularity finds more than the model."
    ]


def _gate_notes(diagnostics: dict[str, Any]) -> list[str]:
    gates = diagnostics.get("gates")
    if not gates:
        return []
    weights = gates["mean_weight"]
    share = {task: gates["entropy_nats"][task] / max(np.log(len(w)), 1e-9) for task, w in weights.items() if len(w) > 1}
    even = [task for task, value in share.items() if value >= EVEN]
    if share and len(even) == len(share):
        return [
            "All gates are nearly even: the experts act as one shared bottom (network.gate_preference sets them apart)."
        ]
    return [f"The gates of {', '.join(even)} are nearly even."] if even else []


def _advice(result: dict[str, Any], against: Difference) -> list[str]:
    advice = []
    steps = result["test"].get("transition", {})
    counted = steps.get("counted", {}).get("queries", 0) / max(sum(s["queries"] for s in steps.values()), 1)
    if not result.get("blend"):
        advice.append("Evaluate with blend=auto: counted sources in addition to the model cost no training.")
    if counted >= COUNTED_SHARE and not result.get("transition_terms"):
        advice.append(
            f"{counted:.0%} of the test steps were counted in train: train with network.transitions=true, "
            "which adds the counts to the model's own score."
        )
    if not result["refit"]:
        advice.append("For recommendations, train with train.refit=true: the valid clicks are then trained on too.")
    if against.p >= SIGNIFICANCE_LEVEL:
        advice.append("For a decision, use more sessions or several seeds (python -m retrieval.compare).")
    return advice
