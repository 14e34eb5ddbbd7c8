"""The page of `python -m etl.describe`: datasets' tables and distributions."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from etl.dataset import Dataset
from etl.logs.tenrec_published import NUMBERS, PUBLISHED, SCAN_STATISTICS
from etl.runtime.arrays import AnyArray

ROWS = ("users", "items", "exposures", "clicks", "likes", "shares", "follows", "reads", "favorites")
NEGATIVE = ("skip", "entered", "passive", "other", "before_first", "after_test")
TOLERANCE = 0.2
"""Relative tolerance for statistics of a log compared with the real one."""
TRANSITIONS = {
    "from_last": "test clicks that follow the last visible click in train",
    "from_last_three": "… one of the last three",
    "from_any": "… any visible click",
    "from_random": "… a random visible click (what a shuffled order would leave of the first line)",
    "repeats": "test clicks that the session has clicked before",
}
BOXPLOT_LIMIT = 500
"""Marked in the boxplot: most videos are watched less often."""
CSS = """:root{color-scheme:light dark;--ink:#1f2933;--soft:#52606d;--line:#e4e7eb;--page:#f5f7fa;--card:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7eb;--soft:#a7b1bc;--line:#3b4754;--page:#12181f;--card:#1c242d}}
body{font:16px/1.5 system-ui,sans-serif;margin:0;color:var(--ink);background:var(--page)}
main{max-width:64rem;margin:auto;padding:1rem}h1{font-size:1.6rem}h2{font-size:1.15rem}h3{font-size:1rem}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.6rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th{color:var(--soft);font-weight:500}
td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left}svg{width:100%;min-width:34rem;height:auto;background:#fff}"""


def watched(dataset: Dataset) -> tuple[AnyArray, AnyArray]:
    """Clicks and watches (sum of `watching_times`) of each item with a retained click; int64 `[items]` each."""
    clicks, times = (np.zeros(dataset.manifest.n_items + 1, np.int64) for _ in range(2))
    for entry in dataset.session_files:
        table = pq.read_table(dataset.file(entry.path), columns=["items", "watching_times"])
        item, watching = (c.combine_chunks().flatten().to_numpy() for c in table.columns)
        clicks += np.bincount(item, minlength=len(clicks))
        times += np.bincount(item, weights=watching, minlength=len(times)).astype(np.int64)
    return clicks[clicks > 0], times[clicks > 0]


def boxes(values: dict[str, AnyArray]) -> str:
    """Boxplots side by side on a logarithmic axis, as SVG; whiskers at the 5 % and 95 % quantiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.9 + 0.55 * len(values)), layout="constrained")
    axes = figure.subplots()
    # 0 cannot be drawn on a log axis: items that were never watched are drawn at 0.5.
    shown = [np.maximum(v, 0.5) for v in values.values()]
    axes.boxplot(shown, orientation="horizontal", tick_labels=list(values), whis=(5, 95), showfliers=False)
    for x, v in enumerate(shown, 1):
        axes.plot(v.max(), x, "x", color="#b00")
    axes.set_xscale("log")
    axes.axvline(BOXPLOT_LIMIT, color="#888", linestyle=":")
    axes.set_xlabel("times an item was clicked or watched (× the largest, dotted: 500)")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    label = "Boxplots of clicks and watching times of the items"
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def page(datasets: list[Dataset]) -> str:
    """The page as HTML, self-contained."""
    sections: list[str] = []
    values: dict[str, AnyArray] = {}
    for dataset in datasets:
        scenario = dataset.manifest.scenario
        statistics = dataset.statistics()
        sections += [section(dataset, statistics), transitions_table(scenario, statistics.get("transitions"))]
        if dataset.session_files:
            clicks, times = watched(dataset)
            counts = {"clicks": clicks}
            if statistics["raw"]["entered"] is not None:  # else the log has no watching times
                counts["watching times"] = times
            values |= {f"{scenario}: {label}": v for label, v in counts.items()}
            sections.append(spread(scenario, counts))
    values = {label: v for label, v in values.items() if len(v)}
    drawn = ""
    if values:
        region = '<div class="wide" tabindex="0" role="region" aria-label="boxplots">'
        drawn = f"<h2>How often an item is clicked or watched</h2>{region}{boxes(values)}</div>"
    return _document("Datasets", "".join(sections) + drawn)


def _document(title: str, body: str) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<link rel="icon" href="data:,"><style>{CSS}</style><title>{title}</title>'
    page = f"<main><h1>{title}</h1>{body}</main>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{page}</body></html>"


def table(label: str, head: Sequence[str], lines: str) -> str:
    """A horizontally scrollable table; `lines` are its rows as HTML."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    rows = f"<thead><tr>{columns}</tr></thead><tbody>{lines}</tbody>"
    return f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>{rows}</table></div>'


def log_page(scenario: str, inputs: list[str], statistics: dict[str, float]) -> str:
    """A log's statistics compared with those of public scans of the real log."""
    known, lines = SCAN_STATISTICS[scenario], []
    for name in [*known, *(name for name in statistics if name not in known)]:
        value, real = statistics.get(name), known.get(name)
        if real is None or value is None:
            verdict = "" if real is None else "not in this log"
        else:
            verdict = "differs" if differs(value, real) else "alike"
        text = number if name in NUMBERS else share
        shown = " – ".join(map(text, real)) if isinstance(real, tuple) else text(real)
        cells = (html.escape(name), text(value), shown, verdict)
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    statistics_table = table("statistics", ["statistic", "this log", "real log", "verdict"], "".join(lines))
    named = ", ".join(html.escape(name) for name in inputs)
    return _document(
        "Log and real log",
        f"<h2>{scenario}: {named}</h2><p>“Real log” is what public scans of the Tenrec files report; a statistic "
        f"differs where it is more than {TOLERANCE:.0%} off.</p>{statistics_table}",
    )


def differs(value: float, real: float | tuple[float, float]) -> bool:
    """Whether a log's statistic differs from the real log's."""
    low, high = real if isinstance(real, tuple) else (real * (1 - TOLERANCE), real * (1 + TOLERANCE))
    return not low <= value <= high


def share(value: float | None) -> str:
    """Format a share in per cent, None as a dash."""
    return "–" if value is None else f"{value:.2%}"


def transitions_table(scenario: str, transitions: dict[str, Any] | None) -> str:
    """How well counted transitions predict the test clicks."""
    if not transitions or not transitions["sessions"]:
        return ""
    lines = "".join(f"<tr><td>{text}</td><td>{transitions[name]:.1%}</td></tr>" for name, text in TRANSITIONS.items())
    branching = transitions["branching"]
    if branching is not None:
        lines += f"<tr><td>different items that follow an item in train, mean</td><td>{branching:.2f}</td></tr>"
    return f"<h3>What counting can learn</h3><p>Of {transitions['sessions']:,} sessions.</p>" + table(
        f"transitions of {scenario}", ["what", "share"], lines
    )


def section(dataset: Dataset, statistics: dict[str, Any]) -> str:
    """Table 1 of a dataset: the log, the retained part, and the published values of the scenario."""
    manifest = dataset.manifest
    published = PUBLISHED.get(manifest.scenario)
    lines = []
    for name in (*ROWS, *NEGATIVE, "mean_clicks"):
        shown = getattr(published, name, None) if published and name not in NEGATIVE else None
        if published and name == "mean_clicks":
            shown = published.clicks / published.users
        values = (statistics["raw"].get(name), statistics["kept"].get(name), shown)
        cells = "".join(f"<td>{number(value)}</td>" for value in values)
        lines.append(f"<tr><td>{name.replace('_', ' ')}</td>{cells}</tr>")
    quarantined = sum(statistics["rows_quarantined"].values())
    sources = ", ".join(html.escape(s.name) for s in manifest.source)
    return (
        f"<h2>{html.escape(manifest.scenario)}</h2><p>{sources}: {statistics['rows_read']:,} rows read, "
        f"{quarantined:,} quarantined. “Published” is the Tenrec paper's count of the real log; a twin or an excerpt "
        "differs.</p>" + table(f"counts of {manifest.scenario}", ["count", "log", "kept", "published"], "".join(lines))
    )


def spread(scenario: str, counts: dict[str, AnyArray]) -> str:
    """Quantiles of counts by item, and the share under `BOXPLOT_LIMIT`."""
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
    lines = ""
    for label, v in counts.items():
        if len(v):
            cells = "".join(f"<td>{number(x)}</td>" for x in np.quantile(v, quantiles, method="inverted_cdf"))
            lines += f"<tr><td>{label} of an item</td>{cells}<td>{np.mean(v < BOXPLOT_LIMIT):.2%}</td></tr>"
    head = ["quantile", *(f"{q:.0%}" for q in quantiles), f"under {BOXPLOT_LIMIT}"]
    return table(f"quantiles of {scenario}", head, lines)


def number(value: float | None) -> str:
    """Format a count with thousands separators, a mean with two decimals, None as a dash."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if isinstance(value, float) and not value.is_integer() else f"{int(value):,}"
