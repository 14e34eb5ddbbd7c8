"""The entries of a blend in `metrics.json` and the report."""

from __future__ import annotations

from typing import Any

from retrieval.blend.fitted import FittedBlend
from retrieval.blend.ranker import BLEND


def describe_blend(learned: FittedBlend) -> dict[str, Any]:
    """Kind, weights, and the metrics they were selected by."""
    return {
        "kind": learned.kind,
        "weights": learned.all_users.weights,
        "temperature": learned.temperature,
        "selection": learned.selection,
    }


def put_blend(blend: dict[str, Any], name: str, split: str, metrics: dict[str, Any]) -> None:
    """Insert the metrics of the blend or of a variant.

    The blend's are stored under the split, those of `sum` and `reranker` in their own entries, those of a single source
    in `sources`, those of the sum without a source in `drop_one`.
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
    """The metrics of a variant that depend on ranks only; its lists are not computed."""
    by_rank = ("hr@", "ndcg@", "mrr@")
    return {key: value for key, value in metrics.items() if key.startswith(by_rank) or key in ("queries", "transition")}
