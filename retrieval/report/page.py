"""The report of a result: metrics, baselines and confidence intervals on one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from etl.dataset import Dataset
from retrieval.blend.report import blend_note, blend_table
from retrieval.metrics.ranking import main_cutoff
from retrieval.rankers.registry import MODEL
from retrieval.report.examples import Example, examples_section
from retrieval.report.figures import figures
from retrieval.report.html import PAGE, html_table, labelled_svg, number
from retrieval.report.verdict import Ranks, Verdict, hit_interval, verdict

SWITCH = """<script>
document.querySelectorAll(".by-metric select").forEach(select => {
  const section = select.closest(".by-metric");
  const show = () => { section.dataset.metric = select.value; };
  select.addEventListener("change", show); show();
});
</script>"""
"""Without JavaScript all columns are shown."""


def write_report(
    path: Path,
    result: dict[str, Any],
    dataset: Dataset,
    run: dict[str, dict[str, Any]],
    ranks: Ranks | None = None,
    examples: Sequence[Example] = (),
) -> str:
    """Write the page, and return the first sentence of its verdict; empty for ranking models.

    Args:
        path: file to write.
        result: content of `metrics.json`.
        dataset: dataset for the histograms.
        run: the training run's `summary` and `diagnostics`; either may be empty.
        ranks: test ranks from `read_ranks`; None for ranking models.
        examples: test sessions with recommendations.
    """
    source = ", ".join(entry.name for entry in dataset.manifest.source)
    title = f"{result['model']} on {source}"
    conclusion = verdict(result, ranks, run["summary"], run["diagnostics"]) if ranks else None
    body = "".join(
        [
            f"<h1>{escape(title)}</h1>",
            _headline(result, dataset),
            _verdict_section(conclusion) if conclusion else "",
            _ranking_section(result, ranks),
            _blend_section(result),
            _feedback_section(result, dataset),
            _lists_section(result),
            _users_section(result),
            examples_section(examples),
            '<div class="figures">',
            *(_figure(*entry) for entry in figures(result, dataset, run["diagnostics"])),
            "</div>",
            _method_section(result, dataset),
            SWITCH,
        ]
    )
    path.write_text(PAGE.format(title=escape(title), body=body), encoding="utf-8")
    return conclusion.answer if conclusion else ""


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


def _ranking_rows(result: dict[str, Any], split: str) -> tuple[list[str], list[tuple[str, list[str], bool]]]:
    names = [f"{metric}@{k}" for metric in ("hr", "ndcg", "mrr") for k in result["cutoffs"]]
    names.append(f"coverage@{result['cutoffs'][-1]}")
    rankers = [(result["model"], result.get(split, {}), True)]
    if result.get("blend"):
        rankers.append(("blend", result["blend"].get(split, {}), False))
    rankers += [(name, metrics.get(split, {}), False) for name, metrics in result["baselines"].items()]
    rows = [(name, [number(m.get(n)) for n in names], mark) for name, m, mark in rankers if "queries" in m]
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
    key_figures = [
        (f"{counts['sessions']:,}", "sessions"),
        (f"{counts['items']:,}", "items"),
        (f"{counts['clicks']:,}", "clicks"),
    ]
    if "queries" in test:
        k = main_cutoff(result["cutoffs"])
        key_figures.insert(0, (f"{test[f'hr@{k}']:.1%}", f"HR@{k} of the model on test"))
        if result.get("blend"):
            key_figures.insert(1, (f"{result['blend']['test'][f'hr@{k}']:.1%}", f"HR@{k} of the blend"))
    numbers = "".join(f"<span><b>{escape(value)}</b>{escape(name)}</span>" for value, name in key_figures)
    return f'<div class="numbers">{numbers}</div>'


def _verdict_section(conclusion: Verdict) -> str:
    lines = [conclusion.answer, conclusion.cost, *conclusion.notes]
    text = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    advice = "".join(f"<li>{escape(line)}</li>" for line in conclusion.advice)
    advice = f'<p class="soft">What to do next:</p><ul class="soft">{advice}</ul>' if advice else ""
    return f'<section class="verdict"><h2>Verdict</h2>{text}{advice}</section>'


def _ranking_section(result: dict[str, Any], ranks: Ranks | None) -> str:
    tables_html, k = [], main_cutoff(result["cutoffs"]) if result["cutoffs"] else 0
    for split in ("test", "valid"):
        header, rows = _ranking_rows(result, split)
        if not rows:
            continue
        columns = ["", *(name.partition("@")[0] for name in header[1:])]
        lines = [([name, *values], mark) for name, values, mark in rows]
        if split == "test" and ranks:
            header, columns = [*header, f"HR@{k}: 95 % interval"], [*columns, "HR"]
            names = [MODEL if mark else name for name, _, mark in rows]
            lines = [
                ([*cells, _interval(ranks, name, k)], mark) for name, (cells, mark) in zip(names, lines, strict=True)
            ]
        columns = [name if name in METRIC_NAMES else "" for name in columns]
        tables_html.append(html_table(header, lines, columns, f"next click, {split}"))
    if not tables_html:
        return ""
    test = result["test"]
    note = f"{test['queries']:,} queries, one for each session; all candidates are ranked." if "queries" in test else ""
    sampled = min((m["test"]["queries"] for m in _measured(result)), default=test.get("queries", 0))
    if sampled < test.get("queries", 0):
        note += f" Baselines but popularity were measured on {sampled:,} of them, evenly spaced (baseline_queries)."
    if not result["mask_seen"]:
        note += " Items of the session are candidates here; recommended lists (topk.parquet) leave them out."
    repeats = test.get("repeat_share")
    if repeats is not None:
        note += f" {repeats:.1%} of the targets were clicked before in their session."
    choices = "".join(f"<option>{name}</option>" for name in METRIC_NAMES)
    switch = f'<p class="controls"><label>Metric <select>{choices}</select></label></p>'
    tables = "<br>".join(tables_html)
    return f'<section class="by-metric"><h2>Next click</h2>{switch}{tables}<p class="soft">{note}</p></section>'


def _measured(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [metrics for metrics in result["baselines"].values() if "queries" in metrics.get("test", {})]


METRIC_NAMES = ("HR", "NDCG", "MRR")


def _interval(ranks: Ranks, name: str, k: int) -> str:
    low, high = hit_interval(ranks, name, k)
    return f"{low:.4f} – {high:.4f}"


def _lists_section(result: dict[str, Any]) -> str:
    """Diversity of the lists recommended by model, blend and baselines."""
    if "queries" not in result.get("test", {}):
        return ""
    k = result["cutoffs"][-1]
    rankers = [(result["model"], result["test"], True)]
    rankers += [("blend", result["blend"]["test"], False)] if result.get("blend") else []
    rankers += [(name, metrics.get("test", {}), False) for name, metrics in result["baselines"].items()]
    names = [f"{name}@{k}" for name in ("coverage", "gini", "novelty", "popularity")]
    rows = [([name, *(number(m.get(n)) for n in names)], mark) for name, m, mark in rankers if names[0] in m]
    header = ["test", f"coverage@{k}", f"Gini@{k}", f"novelty@{k} (bits)", f"mean train clicks@{k}"]
    note = (
        "Coverage: share of the candidates that are recommended to anybody. Gini: 0 where all items are recommended "
        "equally often, 1 where one is. Novelty: mean of −log2 of an item's share of the train clicks."
    )
    table = html_table(header, rows, label="recommended lists")
    return f'<section><h2>Recommended lists</h2>{table}<p class="soft">{note}</p></section>'


def _users_section(result: dict[str, Any]) -> str:
    """HR of the model and of popularity by gender and age, as the log codes them."""
    k, rows = main_cutoff(result["cutoffs"]) if result["cutoffs"] else 0, []
    for kind in ("gender", "age"):
        base = result["baselines"].get("popularity", {}).get("test", {}).get(kind, {})
        for name, metrics in result.get("test", {}).get(kind, {}).items():
            other = base.get(name, {}).get(f"hr@{k}")
            rows.append(
                ([f"{kind} {name}", f"{metrics['queries']:,}", number(metrics[f"hr@{k}"]), number(other)], False)
            )
    if len(rows) < 3:
        return ""
    table = html_table(["test", "sessions", f"HR@{k}", f"popularity: HR@{k}"], rows, label="by gender and age")
    note = "Codes of the log; −1 or unknown where it has none."
    return f'<section><h2>By gender and age</h2>{table}<p class="soft">{note}</p></section>'


def _blend_section(result: dict[str, Any]) -> str:
    if not result.get("blend"):
        return ""
    header, rows = blend_table(result, main_cutoff(result["cutoffs"]))
    table, note = html_table(header, rows, label="sources joined"), escape(blend_note(result))
    return f'<section><h2>Sources joined</h2>{table}<p class="soft">{note}</p></section>'


def _feedback_section(result: dict[str, Any], dataset: Dataset) -> str:
    rows = _feedback_rows(result, "test")
    if not rows:
        return ""
    table = html_table(
        ["test", *FEEDBACK_HEADER], (([task, *values], False) for task, values in rows), label="feedback"
    )
    note = feedback_note(dataset)
    return f'<section><h2>Feedback</h2>{table}<p class="soft">{note}</p></section>'


def feedback_note(dataset: Dataset) -> str:
    """What the rows of the feedback table are, and what a log of clicked rows alone cannot tell."""
    note = "Each row is an item shown after the last visible click, scored before it is seen. "
    note += "GAUC weights users by their rows."
    kept = dataset.statistics()["kept"]
    if dataset.shows_exposures and kept["exposures"] > kept["clicks"]:
        return note
    return (
        f"{note} Nothing here was shown without a click, so these AUCs show that the tasks are trained; "
        "they cannot answer what several tasks give each other."
    )


def _figure(title: str, svg: str, note: str) -> str:
    figure = labelled_svg(svg, f"{title}: {note}")
    return f'<section><h2>{escape(title)}</h2>{figure}<p class="soft">{escape(note)}</p></section>'


def _method_section(result: dict[str, Any], dataset: Dataset) -> str:
    lines = []
    index = result.get("index")
    if index:
        fidelity = f"recall@20 {index['recall_at_20_vs_exact']:.4f}"
        if index["hr_20_vs_exact"] is not None:
            fidelity += f", HR@20 {index['hr_20_vs_exact']:.4f}"
        lines.append(
            f"Index {index['kind']}: {fidelity} of exact search on {index['sample_queries']:,} test queries; "
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
