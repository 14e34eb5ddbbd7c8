"""One self-contained page about one result: what was found, beside what, and how far to trust it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from etl.dataset import Dataset
from retrieval.blend.report import blend_note, blend_table
from retrieval.bundle import Queries
from retrieval.report.figures import figures

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>
:root {{ color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --accent: #1769aa; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; color: var(--ink); background: #f5f7fa; font: 16px/1.5 system-ui, sans-serif; }}
main {{ max-width: 72rem; margin: 0 auto; padding: 1.25rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }}
h2 {{ font-size: 1.15rem; margin: 0 0 .5rem; }}
section {{ background: #fff; border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin: 1rem 0; }}
p {{ margin: .4rem 0; max-width: 46rem; }} .soft {{ color: var(--soft); font-size: .92rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: #fff; }}
tr.model td {{ font-weight: 600; }} th {{ color: var(--soft); font-weight: 500; }}
.figures {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }}
.figures section {{ margin: 0; min-width: 0; }}
svg {{ width: 100%; max-width: 34rem; height: auto; display: block; }}
@media (max-width: 40rem) {{ main {{ padding: .75rem; }} th, td {{ padding: .3rem .45rem; font-size: .9rem; }}
  td:first-child {{ white-space: normal; overflow-wrap: anywhere; min-width: 7.5rem; max-width: 7.5rem; }} }}
.numbers {{ display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin: .8rem 0; }}
.numbers b {{ display: block; font-size: 1.5rem; line-height: 1.2; color: var(--accent); }}
</style></head><body><main>{body}</main></body></html>
"""


EXAMPLES, LAST_CLICKS, RECOMMENDED = 5, 5, 10


def write_report(
    path: Path,
    result: dict[str, Any],
    dataset: Dataset,
    diagnostics: dict[str, Any],
    examples: Sequence[dict[str, Any]] = (),
) -> None:
    """Write the page.

    Args:
        path: file to write.
        result: what `metrics.json` holds.
        dataset: for the histograms.
        diagnostics: the training run's curves and gates; may be empty.
        examples: sessions with their recommendations, of `examples_of`.
    """
    source = ", ".join(entry.name for entry in dataset.manifest.source)
    title = f"{result['model']} on {source}"
    body = "".join(
        [
            f"<h1>{escape(title)}</h1>",
            _headline(result, dataset),
            _ranking_section(result),
            _blend_section(result),
            _feedback_section(result),
            '<div class="figures">',
            *(_figure(*entry) for entry in figures(result, dataset, diagnostics)),
            "</div>",
            _examples_section(examples),
            _method_section(result, dataset),
        ]
    )
    path.write_text(PAGE.format(title=escape(title), body=body))


def table_text(result: dict[str, Any]) -> str:
    """The test table for a terminal."""
    header, rows = _ranking_rows(result, "test")
    lines = [[name, *values] for name, values, _ in rows]
    if not lines:
        header, lines = ["task", *FEEDBACK_HEADER], [[task, *values] for task, values in _feedback_rows(result, "test")]
    widths = [max(len(row[i]) for row in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *lines]
    )


def number(value: float | None, digits: int = 4) -> str:
    """A figure of a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def html_table(header: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]]) -> str:
    """A table that scrolls sideways; each row with whether it stands out."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join(
        f"<tr{' class=model' if mark else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row, mark in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _ranking_rows(result: dict[str, Any], split: str) -> tuple[list[str], list[tuple[str, list[str], bool]]]:
    names = [f"{metric}@{k}" for metric in ("hr", "ndcg", "mrr") for k in result["cutoffs"]]
    names.append(f"coverage@{result['cutoffs'][-1]}")
    found = [(result["model"], result.get(split, {}), True)]
    if result.get("blend"):
        found.append(("blend", result["blend"].get(split, {}), False))
    found += [(name, metrics.get(split, {}), False) for name, metrics in result["baselines"].items()]
    rows = [(name, [number(m.get(n)) for n in names], mark) for name, m, mark in found if "queries" in m]
    labels = [n.replace("hr@", "HR@").replace("ndcg", "NDCG").replace("mrr", "MRR") for n in names]
    return ["test" if split == "test" else split, *labels], rows


FEEDBACK_HEADER = ["AUC", "AUC given click", "GAUC", "item's own rate: AUC", "log-loss", "rows", "positives"]


def _feedback_rows(result: dict[str, Any], split: str) -> list[tuple[str, list[str]]]:
    metrics = result.get(split, {})
    rate = result["baselines"].get("item_rate", {}).get(split, {})
    tasks = [name.removeprefix("rows/") for name in metrics if name.startswith("rows/")]
    return [
        (
            task,
            [
                number(metrics[f"auc/{task}"]),
                number(metrics[f"auc/{task}_given_click"]),
                number(metrics[f"gauc/{task}"]),
                number(rate.get(f"auc/{task}")),
                number(metrics.get(f"log_loss/{task}")),
                f"{metrics[f'rows/{task}']:,}",
                f"{metrics[f'positives/{task}']:,}",
            ],
        )
        for task in tasks
    ]


def _headline(result: dict[str, Any], dataset: Dataset) -> str:
    counts, test = dataset.manifest.counts, result.get("test", {})
    facts = [
        (f"{counts['sessions']:,}", "sessions"),
        (f"{counts['items']:,}", "items"),
        (f"{counts['clicks']:,}", "clicks"),
    ]
    sentence = ""
    if "queries" in test:
        k = 10 if "hr@10" in test else result["cutoffs"][-1]
        facts.insert(0, (f"{test[f'hr@{k}']:.1%}", f"HR@{k} on test"))
        base = result["baselines"]["popularity"]["test"][f"hr@{k}"]
        if base:
            sentence = (
                f"<p>For {test[f'hr@{k}']:.1%} of the sessions the item clicked next is among the {k} recommended; "
                f"recommending the most popular items to everyone reaches {base:.1%}.</p>"
            )
    numbers = "".join(f"<span><b>{escape(value)}</b>{escape(name)}</span>" for value, name in facts)
    return f'<div class="numbers">{numbers}</div>{sentence}'


def _ranking_section(result: dict[str, Any]) -> str:
    parts = []
    for split in ("test", "valid"):
        header, rows = _ranking_rows(result, split)
        if rows:
            parts.append(html_table(header, (([name, *values], mark) for name, values, mark in rows)))
    if not parts:
        return ""
    test = result["test"]
    note = f"{test['queries']:,} queries, one for each session; all candidates are ranked." if "queries" in test else ""
    repeats = test.get("repeat_share")
    if repeats is not None:
        note += f" {repeats:.1%} of the targets were clicked before in their session."
    return f'<section><h2>Next click</h2>{"<br>".join(parts)}<p class="soft">{note}</p></section>'


def _blend_section(result: dict[str, Any]) -> str:
    if not result.get("blend"):
        return ""
    header, rows = blend_table(result, 10 if 10 in result["cutoffs"] else result["cutoffs"][-1])
    note = escape(blend_note(result))
    return f'<section><h2>Sources joined</h2>{html_table(header, rows)}<p class="soft">{note}</p></section>'


def _feedback_section(result: dict[str, Any]) -> str:
    rows = _feedback_rows(result, "test")
    if not rows:
        return ""
    table = html_table(["test", *FEEDBACK_HEADER], (([task, *values], False) for task, values in rows))
    note = "Each row is an item shown after the last visible click, scored before it is seen. "
    note += "GAUC weights users by their rows."
    if result["test"].get("auc/click") is None:
        note += (
            " Nothing here was shown without a click, so these AUCs show that the tasks are trained; "
            "they cannot answer what several tasks give each other."
        )
    return f'<section><h2>Feedback</h2>{table}<p class="soft">{note}</p></section>'


def _examples_section(examples: Sequence[dict[str, Any]]) -> str:
    """Some sessions with their last clicks and what is recommended next."""
    if not examples:
        return ""
    rows = (
        ([str(e["user_id"]), " ".join(map(str, e["clicked"])), " ".join(map(str, e["recommended"]))], False)
        for e in examples
    )
    table = html_table(["user", "last clicks, oldest first", "recommended next, best first"], rows)
    note = "Raw item ids; the first sessions of the dataset, after all their kept clicks."
    return f'<section><h2>Examples</h2>{table}<p class="soft">{note}</p></section>'


def examples_of(topk: Path, queries: Queries | None, item_id: np.ndarray) -> list[dict[str, Any]]:
    """The first `EXAMPLES` sessions with what `topk.parquet` recommends to them.

    Args:
        topk: the file.
        queries: those of `queries-next`, its first batch.
        item_id: int64 `[n_items + 1]`, raw ids.
    """
    if queries is None or not len(queries):
        return []
    listed = next(pq.ParquetFile(topk).iter_batches(min(EXAMPLES, len(queries)))).to_pylist()
    out = []
    for row, told in enumerate(listed):
        seen = queries.seen[queries.seen_offset[row] : queries.seen_offset[row + 1]][-LAST_CLICKS:]
        clicked = item_id[seen].tolist()
        out.append({"user_id": told["user_id"], "clicked": clicked, "recommended": told["item_ids"][:RECOMMENDED]})
    return out


def _figure(title: str, svg: str, note: str) -> str:
    return f'<section><h2>{escape(title)}</h2>{svg}<p class="soft">{escape(note)}</p></section>'


def _method_section(result: dict[str, Any], dataset: Dataset) -> str:
    lines = []
    index = result.get("index")
    if index:
        kept = f"recall@20 {index['recall_at_20_vs_exact']:.4f}"
        if index["hr_20_vs_exact"] is not None:
            kept += f", HR@20 {index['hr_20_vs_exact']:.4f}"
        lines.append(
            f"Index {index['kind']}: {kept} of exact search on {index['sample_queries']:,} test queries; "
            f"{index['queries_per_second']:,.0f} queries/s (exact: {index['exact_queries_per_second']:,.0f})."
        )
        lines.append(
            "Ties count against the model: the rank of a target is 1 + the number of other candidates "
            "that score no lower. "
            + (
                "Items seen in the session are no candidates."
                if result["mask_seen"]
                else "Items seen in the session stay candidates."
            )
            + f" Candidates: {result['candidates']}."
        )
    if result["refit"]:
        lines.append("The model was trained once more with the valid clicks, so valid has no scores.")
    protocol = dataset.manifest.protocol
    lines.append(
        f"Protocol {protocol['name']}: users with at least {protocol['min_clicks']} clicks, "
        f"their last {protocol['max_clicks']}; the last click is test, the one before it valid."
    )
    lines.append(
        "Item counts cover the train clicks of all sessions. The logs have no timestamps: other users' later clicks "
        "are in training, as in the Tenrec benchmark."
    )
    return (
        "<section><h2>How it was measured</h2>"
        + "".join(f'<p class="soft">{escape(line)}</p>' for line in lines)
        + "</section>"
    )
