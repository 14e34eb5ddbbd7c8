"""The search report page: distribution of trials, each option against the metric, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from retrieval.report.charts import points
from retrieval.report.html import PAGE, html_table, labelled_svg

FIXED = ("trial", "state", "epochs", "best_epoch", "seconds", "parameters", "error", "options")


def page(model: str, metric: str, rows: Sequence[dict[str, Any]], trials: int) -> str:
    """The page as HTML, self-contained.

    Args:
        model: name of the model.
        metric: validation metric of the comparison.
        rows: trials with a metric, best first.
        trials: number of trials of the search.
    """
    key = f"valid/{metric}"
    values = [row[key] for row in rows]
    options = [
        n for n in dict.fromkeys(n for row in rows for n in row) if n not in FIXED and not n.startswith("valid/")
    ]
    header = ["trial", "state", metric, "best epoch", "epochs", "minutes", *options]
    lines = []
    for number, row in enumerate(rows):
        minutes = "–" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}"
        cells = [
            str(row["trial"]),
            row["state"],
            f"{row[key]:.4f}",
            str(row["best_epoch"]),
            str(row["epochs"]),
            minutes,
        ]
        lines.append(([*cells, *("recipe's" if row.get(n) is None else str(row[n]) for n in options)], number == 0))
    title = f"{model}: {len(rows)} of {trials} trials"
    spread = (
        f"Valid {metric}: best {values[0]:.4f}, median {statistics.median(values):.4f}, worst {values[-1]:.4f}. "
        "Trials were judged on valid clicks alone; the test click was not read. Stopped trials have fewer epochs than "
        "finished ones, so their values are lower bounds."
    )
    figures = "".join(_figure(name, metric, rows) for name in options)
    table = html_table(header, lines, label="trials")
    body = (
        f"<h1>{escape(title)}</h1><section><h2>Spread</h2><p>{escape(spread)}</p></section>"
        f'<section><h2>Trials, best first</h2>{table}</section><div class="figures">{figures}</div>'
    )
    return PAGE.format(title=escape(title), body=body)


def _figure(name: str, metric: str, rows: Sequence[dict[str, Any]]) -> str:
    """One option's values against the metric; trials that use the recipe's value are omitted."""
    pairs = [(row[name], row[f"valid/{metric}"]) for row in rows if row.get(name) is not None]
    label = f"{metric} of each trial by {name}"
    svg = labelled_svg(points(pairs, name, metric), label)
    return f"<section><h2>{escape(name)}</h2>{svg}</section>"
