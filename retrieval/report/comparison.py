"""The comparison page of several results over the same queries.

Every ranker of every result is compared with the first result's model on the test queries.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from etl.runtime.arrays import IntArray
from etl.runtime.errors import InputError
from etl.runtime.object_store import download_if_remote
from etl.runtime.output_file import new_file
from retrieval.metrics.significance import GAINS, SIGNIFICANCE_LEVEL, compare, format_p, gains, holm, interval
from retrieval.rankers.registry import MODEL
from retrieval.ranks_file import read_ranks
from retrieval.report.charts import forest
from retrieval.report.html import PAGE, html_table, labelled_svg, number
from retrieval.result_folder import METRICS, RANKS

ALIKE = ("dataset", "mask_seen", "candidates")
"""Fields that must be equal in compared results."""


@dataclass(frozen=True)
class Row:
    """One ranker and metric; differences are to the first model.

    Attributes:
        low, high: 95 % bootstrap interval over users.
        p: two-sided p-value, Holm-corrected over the table; None for the first model.
    """

    ranker: str
    metric: str
    value: float
    low: float
    high: float
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Result:
    """A result folder: its metrics, and its test ranks by ranker."""

    folder: Path
    summary: dict[str, Any]
    tables: dict[str, pa.Table]

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Read a folder; `InputError` if it is not the result of a session model."""
        try:
            summary = json.loads((folder / METRICS).read_text())
            missing = [name for name in ("model", "test", *ALIKE) if name not in summary]
            if missing or not isinstance(summary["test"], dict) or not isinstance(summary["model"], str):
                raise ValueError(f"no {(missing or ['test metrics'])[0]} in {METRICS}")
            if "queries" not in summary["test"] and not (folder / RANKS).is_file():
                raise InputError("results with ranked test queries", folder, "ranking models have none")
            opened = cls(folder, summary, read_ranks(folder / RANKS))
            if any((table["rank"].to_numpy() < 1).any() for table in opened.tables.values()):
                raise ValueError(f"a rank below 1 in {RANKS}")
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
            got = f"{folder} ({str(error).splitlines()[0]})"
            raise InputError("result folders of python -m retrieval", got, "name others, or evaluate again") from None
        if MODEL not in opened.tables:
            raise InputError("results with ranked test queries", folder, "ranking models have none")
        return opened

    @property
    def queries(self) -> pa.Table:
        """Users and targets of the test queries."""
        return self.tables[MODEL].select(["user_id", "target"])

    def check(self, first: Result, metrics: Sequence[str]) -> None:
        """Raise `InputError` if the result cannot be compared with the first one by these metrics."""
        known = [name for name in self.summary["test"] if name.partition("@")[0] in GAINS]
        missing = [m for m in metrics if m not in known]
        if missing:
            hint = f"evaluate {self.folder} with other cutoffs, or choose one of these"
            raise InputError(f"metrics of {', '.join(known)}", missing[0], hint)
        for name in ALIKE:
            if self.summary[name] != first.summary[name]:
                raise InputError(
                    f"{name}={first.summary[name]}", f"{self.summary[name]} in {self.folder}", "evaluate both alike"
                )
        if not self.queries.equals(first.queries):
            raise InputError(
                "results over the same queries", f"others in {self.folder}", "evaluate both on one dataset"
            )


def read_results(folders: Sequence[str], metrics: Sequence[str]) -> dict[str, IntArray]:
    """Test ranks of every model, then of every baseline, over the same queries in the same order.

    A baseline with equal ranks in several results is listed once.

    Raises:
        InputError: results over different queries, or without a metric.
    """
    results = [Result.read(download_if_remote(folder, last_file=METRICS)) for folder in folders]
    rankers: dict[str, IntArray] = {}
    for result in results:
        result.check(results[0], metrics)
        add_ranker(rankers, result.summary["model"], result.folder, result.tables[MODEL])
    models = set(rankers)
    for result in results:
        for name, table in result.tables.items():
            if name == MODEL:
                continue
            if len(table) != len(result.queries):
                print(f"note: {name} of {result.folder} is left out: ranked on a sample only", file=sys.stderr)
            elif name in models or not _is_known(rankers, name, table):
                add_ranker(rankers, name, result.folder, table)
    return rankers


def add_ranker(rankers: dict[str, IntArray], name: str, folder: Path, table: pa.Table) -> None:
    """Add a ranker under its name; on conflicts with its folder, and a number."""
    label, count = name, 2
    while label in rankers:
        label = f"{name} ({folder})" if count == 2 else f"{name} ({folder}, {count - 1})"
        count += 1
    rankers[label] = table["rank"].to_numpy()


def _is_known(rankers: dict[str, IntArray], name: str, table: pa.Table) -> bool:
    same = (ranks for label, ranks in rankers.items() if label == name or label.startswith(f"{name} ("))
    return any(np.array_equal(ranks, table["rank"].to_numpy()) for ranks in same)


def rows_of(rankers: dict[str, IntArray], metrics: Sequence[str]) -> list[Row]:
    """The table, the first ranker's rows first."""
    base, *others = rankers
    differences = {(name, m): compare(rankers[name], rankers[base], m) for name in others for m in metrics}
    corrected = dict(zip(differences, holm([each.p for each in differences.values()]), strict=True))
    rows = []
    for name, rank in rankers.items():
        for metric in metrics:
            value = gains(rank, metric)
            low, high = interval(value)
            row = Row(name, metric, float(np.mean(value)), low, high)
            if against := differences.get((name, metric)):
                p = float(corrected[name, metric])
                row = replace(
                    row,
                    difference=against.difference,
                    difference_low=against.low,
                    difference_high=against.high,
                    p=p,
                )
            rows.append(row)
    return rows


HEADER = ["ranker", "metric", "test", "95 % interval", "difference", "95 % interval", "p (Holm)"]


def cells(row: Row) -> list[str]:
    """A row as text."""
    out = [row.ranker, row.metric, number(row.value), f"{number(row.low)} – {number(row.high)}"]
    if row.difference is None or row.difference_low is None or row.difference_high is None or row.p is None:
        return [*out, "–", "–", "–"]
    return [*out, f"{row.difference:+.4f}", f"{row.difference_low:+.4f} – {row.difference_high:+.4f}", format_p(row.p)]


def sentence(row: Row, base: str) -> str:
    """A row as a sentence."""
    if row.difference is None or row.p is None:
        return f"{row.ranker}: {row.metric.upper()} {row.value:.4f}, what the others are compared with."
    if row.p >= SIGNIFICANCE_LEVEL:
        return f"{row.ranker}: {row.metric.upper()} {row.value:.4f}, no difference to {base} beyond chance."
    better = "better" if row.difference > 0 else "worse"
    return f"{row.ranker}: {row.metric.upper()} {row.value:.4f}, {better} than {base} by {abs(row.difference):.4f}."


def page(rows: Sequence[Row], queries: int) -> str:
    """The table as one self-contained page, with a forest plot per metric and a sentence per row."""
    base = rows[0].ranker
    title = f"{base} and {len({row.ranker for row in rows}) - 1} others"
    table = html_table(HEADER, [(cells(row), row.ranker == base) for row in rows], label="comparison")
    figures = []
    for metric in dict.fromkeys(row.metric for row in rows):
        of_metric = [row for row in rows if row.metric == metric]
        drawn = [
            (r.ranker, r.difference, r.difference_low, r.difference_high) for r in of_metric if r.difference is not None
        ]
        name = f"{metric.upper()} minus that of {base}"
        said = "".join(f"<li>{escape(sentence(row, base))}</li>" for row in of_metric)
        svg = labelled_svg(forest(drawn, name), name) if drawn else ""
        figures.append(f"<section><h2>{escape(name)}</h2>{svg}<ul class=soft>{said}</ul></section>")
    body = (
        f"<h1>{escape(title)}</h1><div class=figures>{''.join(figures)}</div>"
        f"<section><h2>Next click on {queries:,} test queries</h2>{table}"
        f"<p class=soft>Differences are to {escape(base)}, query by query. Intervals: bootstrap over users. "
        "p: McNemar's exact test for HR, Wilcoxon's signed-rank test for NDCG and MRR, two-sided, corrected by Holm "
        "over the whole table. They tell how sure a difference is for other users, not for another seed.</p></section>"
    )
    return PAGE.format(title=escape(title), body=body)


def _check_output(output: Path) -> None:
    """Refuse to replace files other than an earlier comparison; `InputError` names the file."""
    table = output.with_suffix(".json")
    if not (output.exists() or table.exists()):
        return
    try:
        earlier = json.loads(table.read_text())
        columns = {field.name for field in fields(Row)}
        is_comparison = isinstance(earlier, list) and all(isinstance(r, dict) and r.keys() == columns for r in earlier)
    except (OSError, ValueError):
        is_comparison = False
    if not is_comparison:
        other = table if table.exists() else output
        raise InputError("an output that replaces no other file", other, "choose another output")


def write_comparison(folders: Sequence[str], metrics: Sequence[str], output: Path) -> str:
    """Compare results, write the page `output` and its JSON, and return the table as text.

    Raises:
        InputError: results that cannot be compared.
    """
    _check_output(output)
    rankers = read_results(folders, metrics)
    rows = rows_of(rankers, metrics)
    with new_file(str(output.with_suffix(".json"))) as file:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    with new_file(str(output)) as file:
        file.write_text(page(rows, len(next(iter(rankers.values())))), encoding="utf-8")
    lines = [HEADER, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
