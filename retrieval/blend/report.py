"""The blend's section of the report: single sources, weighted sum, re-ranker, and the gain of each source."""

from __future__ import annotations

from typing import Any


def blend_table(result: dict[str, Any], cutoff: int) -> tuple[list[str], list[tuple[list[str], bool]]]:
    """Header and rows, each with whether it is highlighted."""
    blend = result["blend"]
    header = ["test", f"HR@{cutoff}", f"NDCG@{cutoff}", f"valid NDCG@{cutoff}", "HR, step counted", "HR, step new"]
    header += ["weight", f"NDCG@{cutoff} of the sum without it", "ms a query"]
    rows = [(_row(f"{result['model']} + sources: {blend['kind']}", blend, cutoff), True)]
    for kind in ("sum", "reranker"):
        if kind in blend:
            rows.append((_row(kind, blend[kind], cutoff, ms=blend["milliseconds"].get(kind)), False))
    for name, by_split in blend.get("sources", {}).items():
        without = blend.get("drop_one", {}).get(name, {}).get("test", {}).get(f"ndcg@{cutoff}")
        weight, ms = blend["weights"].get(name), blend["milliseconds"].get(name)
        rows.append((_row(f"{name} alone", by_split, cutoff, weight=weight, without=without, ms=ms), False))
    return header, rows


def _row(name: str, by_split: dict[str, Any], cutoff: int, **more: float | None) -> list[str]:
    test, valid = by_split.get("test", {}), by_split.get("valid", {})
    step = test.get("transition", {})
    values = [test.get(f"hr@{cutoff}"), test.get(f"ndcg@{cutoff}"), valid.get(f"ndcg@{cutoff}")]
    values += [step.get(kind, {}).get(f"hr@{cutoff}") for kind in ("counted", "new")]
    values += [more.get(key) for key in ("weight", "without", "ms")]
    return [name, *("–" if value is None else f"{value:.4f}" for value in values)]


def blend_note(result: dict[str, Any]) -> str:
    """Explanation of the table."""
    step = result["blend"].get("test", {}).get("transition", {})
    queries = {kind: metrics["queries"] for kind, metrics in step.items()}
    share = queries.get("counted", 0) / max(sum(queries.values()), 1)
    every, sampled = _queries(result["blend"]), _queries(result["blend"].get("sum", {}))
    sample = f"All rows but the first are of {sampled:,} sampled queries. " if 0 < sampled < every else ""
    return sample + (
        "Sources alone rank the candidates of all sources. Weights and re-ranker are learned on valid queries; "
        "valid figures come from what was learned without their users. "
        f"The step from the last click to the target was counted in train for {share:.1%} of the test queries."
    )


def _queries(metrics: dict[str, Any]) -> int:
    return int(metrics.get("test", {}).get("queries", 0))
