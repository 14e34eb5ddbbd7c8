"""The entries of a blend in `metrics.json` and the report."""

from __future__ import annotations

from typing import Any

from retrieval.blend.learned import Learned
from retrieval.blend.ranker import BLEND


def describe_blend(learned: Learned) -> dict[str, Any]:
    """Kind, weights, and what they were chosen by."""
    return {
        "kind": learned.kind,
        "weights": learned.everyone.weights,
        "temperature": learned.temperature,
        "selection": learned.selection,
    }


def put_blend(blend: dict[str, Any], name: str, split: str, metrics: dict[str, Any]) -> None:
    """Put the metrics of the blend or of a variant where they belong.

    The blend's stand under the split; `sum` and `reranker` have entries of their own; a source alone stands in
    `sources`, the sum without it in `drop_one`.
    """
    variant = name.removeprefix(BLEND).removeprefix("-")
    kind, _, source = variant.partition("-")
    if not variant:
        blend[split] = metrics
    elif not source:
        blend.setdefault(kind, {})[split] = ranks_of(metrics)
    else:
        section = "sources" if kind == "source" else "drop_one"
        blend.setdefault(section, {}).setdefault(source, {})[split] = ranks_of(metrics)


def ranks_of(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a variant's ranks give: nothing is known of its lists."""
    by_rank = ("hr@", "ndcg@", "mrr@")
    return {key: value for key, value in metrics.items() if key.startswith(by_rank) or key in ("queries", "transition")}
