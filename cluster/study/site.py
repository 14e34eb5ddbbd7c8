"""The study's static site: an index page with the answers, a page per experiment, the data of each figure as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from cluster.study.experiment import Experiment, reference
from cluster.study.experiments import BY_COST, LADDER, MULTI_TASK
from cluster.study.findings import (
    Estimates,
    LogResult,
    Results,
    answer,
    is_sure,
    label,
    results_of,
    test_metrics,
    with_interval,
)
from cluster.study.logs import Log
from cluster.study.trials import Cell
from etl.runtime.output_file import new_file
from retrieval.report.charts import forest, named_points
from retrieval.report.html import PAGE, html_table, labelled_svg, number

WIRING = (
    "MovieLens-100K shows the wiring: every rating is a click, a share is also a like, and nothing is shown without a "
    "click. It cannot say what several tasks give each other."
)
GENERATED = "A generated log: what depends on how the generator makes tasks and transitions is true by construction."
NO_STAR = (
    "STAR (Yeganegi and Haratizadeh, Neurocomputing) needs the time between clicks. Tenrec's logs have no times, so it "
    "has no row here."
)


def write_site(folder: Path, title: str, cells: Sequence[Cell], rows: Sequence[dict[str, Any]]) -> Path:
    """Write all pages and files, and return the first page.

    Args:
        folder: folder of the site.
        title: name of the study.
        cells: cells of all experiments and logs.
        rows: the results table.
    """
    results = results_of(cells)
    experiments = {name: [result for (n, _), result in results.items() if n == name] for name, _ in results}
    for name, of_experiment in experiments.items():
        _write(folder / f"{name}.html", of_experiment[0].experiment.question, _experiment_page(of_experiment))
        for result in of_experiment:
            _write_file(folder / _csv_name(result.experiment, result.log), _csv(result.experiment, result.estimates))
    _write(folder / "trials.html", "Trials", _trials_page(rows))
    _write_file(folder / "tables.md", "\n".join(_markdown(of_experiment) for of_experiment in experiments.values()))
    first = folder / "index.html"
    _write(first, f"Study: {title}", _first_page(experiments, results))
    return first


def _write(path: Path, title: str, body: str) -> None:
    nav = "" if path.name == "index.html" else '<p><a href="index.html">All experiments</a></p>'
    _write_file(path, PAGE.format(title=escape(title), body=f"{nav}<h1>{escape(title)}</h1>{body}"))


def _write_file(path: Path, text: str) -> None:
    with new_file(str(path)) as file:
        file.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# Index page


def _first_page(experiments: dict[str, list[LogResult]], results: Results) -> str:
    logs = list({result.log.name: result.log for result in results.values()}.values())
    said = "".join(_multi_task(results, logs))
    sections = [f'<section class="verdict"><h2>Does multi-task learning help?</h2>{said}</section>']
    links = []
    for name, of_experiment in experiments.items():
        experiment = of_experiment[0].experiment
        said = " ".join(f"<b>{escape(result.log.name)}</b>: {escape(_answer(result))}" for result in of_experiment)
        link = f'<a href="{name}.html">{escape(experiment.question)}</a>'
        links.append(f"<section><h2>{link}</h2><p>{said}</p></section>")
    sections += links
    sections.append(
        f'<section><h2>More</h2><p><a href="trials.html">All trials</a>, failed ones too. <a href="tables.md">All '
        f"tables as Markdown</a>.</p><p>{NO_STAR}</p></section>"
    )
    return "".join(sections)


def _answer(result: LogResult) -> str:
    return answer(result.experiment, _main_metric(result.experiment, result.estimates), result.estimates)


def _multi_task(results: Results, logs: Sequence[Log]) -> Iterator[str]:
    for log in logs:
        lines = list(_multi_task_of(results, log))
        if lines:
            yield f"<p><b>{escape(log.name)}</b></p><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _multi_task_of(results: Results, log: Log) -> Iterator[str]:
    """Sentences on one log: next click, feedback, cost, and what would change the answer."""
    ladder, feedback = (results.get((experiment.name, log.name)) for experiment in (LADDER, MULTI_TASK))
    unsure = False
    if ladder:
        estimate = ladder.estimates["hybrid", "hr@20"]
        if estimate.difference is not None:
            unsure |= not is_sure(estimate)
            said = "yes" if estimate.difference > 0 else "no, it costs"
            said = said if is_sure(estimate) else "no difference beyond chance"
            yield f"Next click, HR@20 of the hybrid minus its encoder's: {with_interval(estimate)}: {said}."
        yield from _cost(ladder.cells)
    if feedback:
        for metric in MULTI_TASK.metrics:
            estimate = feedback.estimates["rank_mmoe", metric]
            if metric.startswith("auc/") and "given" not in metric and estimate.difference is not None:
                unsure |= not is_sure(estimate)
                yield (
                    f"{label(metric).removeprefix('AUC ').capitalize()}, AUC of MMoE with all tasks minus that of a "
                    f"network per task: {with_interval(estimate)}."
                )
    if unsure:
        yield "What would change the answer: more users narrow the intervals of clicks, more seeds those of AUCs."
    if note := _note(log):
        yield note


def _note(log: Log) -> str:
    """What a log that is not of a real service cannot say; empty for others."""
    return GENERATED if log.is_generated else WIRING if log.is_movielens else ""


def _cost(cells: Sequence[Cell]) -> Iterator[str]:
    """Cost of the hybrid compared with its encoder."""
    summaries = {
        name: [c.trial.summary for c in cells if c.variant.name == name and not c.trial.failure]
        for name in ("gru4rec", "hybrid")
    }
    if all(summaries.values()):
        rate = {n: fmean(s["examples_per_second"] for s in trials) for n, trials in summaries.items()}
        size = {n: trials[0]["parameters"]["total"] for n, trials in summaries.items()}
        yield (
            f"Cost: the hybrid trains at {rate['hybrid'] / rate['gru4rec']:.2f} × its encoder's events/s and has "
            f"{size['hybrid'] / size['gru4rec']:.2f} × its parameters."
        )


# ---------------------------------------------------------------------------------------------
# Experiment pages


def _experiment_page(results: Sequence[LogResult]) -> str:
    sections = [f"<section><h2>Set-up</h2><p>{escape(results[0].experiment.setup)}</p></section>"]
    sections += map(_log_section, results)
    return "".join(sections)


def _log_section(result: LogResult) -> str:
    experiment, log, cells, estimates = result
    metric = _main_metric(experiment, estimates)
    shown = [m for m in experiment.metrics if any(estimates[v.name, m].mean is not None for v in experiment.variants)]
    header = ["variant", *map(label, shown), f"{label(metric)} minus reference", "seeds"]
    lines = []
    for variant in experiment.variants:
        against = reference(experiment, variant)
        row = [_cell(estimates, variant.name, m) for m in shown]
        difference = with_interval(estimates[variant.name, metric]) if against else "reference"
        seeds = sum(cell.variant.name == variant.name and not cell.trial.failure for cell in cells)
        lines.append(([variant.name, *row, difference, str(seeds)], variant is experiment.variants[0]))
    failed = sorted({f"{cell.variant.name}: {cell.trial.failure}" for cell in cells if cell.trial.failure})
    return (
        f"<section><h2>{escape(log.name)}</h2><p>{escape(_answer(result))}</p>"
        f"{html_table(header, lines, label=f'{experiment.name} on {log.name}')}"
        f'<p class="soft">Test, mean ± standard deviation over seeds; in brackets the share of the best possible. '
        f"Differences: {_tests(metric)} {escape(positives(shown, cells))} {escape(_note(log))}</p>"
        + "".join(f'<p class="soft">Failed: {escape(text)}</p>' for text in failed)
        + "".join(_published_table(*each, experiment.name) for each in _published(experiment, cells))
        + _figures(experiment, metric, cells, estimates)
        + f'<p class="soft"><a href="{_csv_name(experiment, log)}">The numbers as CSV</a></p>'
        + _commands(cells)
        + "</section>"
    )


def _published(experiment: Experiment, cells: Sequence[Cell]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Published results for these logs: source, header, rows."""
    scenarios = {cell.data.scenario for cell in cells}
    for published in experiment.published:
        if published.log in scenarios:
            names = list(dict.fromkeys(name for values in published.rows.values() for name in values))
            rows = [[model, *(number(values.get(n)) for n in names)] for model, values in published.rows.items()]
            yield published.source, ["published, another protocol", *map(label, names)], rows


def _published_table(source: str, header: list[str], rows: list[list[str]], name: str) -> str:
    table = html_table(header, [(row, False) for row in rows], ["soft"] * len(header), f"{name}, published: {source}")
    return f'<p class="soft">Not comparable: {escape(source)}.</p>{table}'


def positives(shown: Sequence[str], cells: Sequence[Cell]) -> str:
    """Number of positives behind a table's AUCs, and their standard error; empty without AUCs."""
    tests = [test_metrics(cell) for cell in cells]
    tasks = dict.fromkeys(m.removeprefix("auc/") for m in shown if m.startswith("auc/") and "given" not in m)
    counts = {task: next((t[f"positives/{task}"] for t in tests if t.get(f"positives/{task}")), 0) for task in tasks}
    if not counts:
        return ""
    said = ", ".join(f"{task} {count:,}" for task, count in counts.items())
    # For an uninformative score and many negatives (Mann and Whitney 1947).
    return f"Positives in test: {said}; an AUC's standard error is about 0.29 / √positives."


def _tests(metric: str) -> str:
    if metric.startswith("auc"):
        return "mean over seeds with Student's 95 % interval; p by a paired t-test, corrected by Holm."
    return (
        "mean over users with a 95 % bootstrap interval; p by Wilcoxon's signed-rank test on the users' means, "
        "corrected by Holm over the table."
    )


def _main_metric(experiment: Experiment, estimates: Estimates) -> str:
    """HR@20 if available, else the first metric that any variant has."""
    order = [m for m in ("hr@20", *experiment.metrics) if m in experiment.metrics]
    return next((m for m in order if any(e.mean is not None for (_, n), e in estimates.items() if n == m)), order[0])


def _cell(estimates: Estimates, variant: str, metric: str) -> str:
    estimate = estimates[variant, metric]
    if estimate.mean is None:
        return "–"
    spread = "" if estimate.spread is None else f" ± {estimate.spread:.4f}"
    return f"{estimate.mean:.4f}{spread}" + (
        "" if estimate.share_of_best is None else f" ({estimate.share_of_best:.0%})"
    )


def _figures(experiment: Experiment, metric: str, cells: Sequence[Cell], estimates: Estimates) -> str:
    rows = []
    for variant in experiment.variants:
        estimate = estimates[variant.name, metric]
        if estimate.difference is not None:
            rows.append((variant.name, estimate.difference, estimate.low, estimate.high))
    out = []
    if rows:
        title = f"{label(metric)} minus the reference's"
        out.append((title, forest(rows, title)))
    if experiment.name in BY_COST:
        costs = {c.variant.name: c.trial.summary for c in cells if c.variant.ranker == "model" and not c.trial.failure}
        pairs = [
            (name, summary["flops_per_example"] / 1e6, estimates[name, metric].mean or 0.0)
            for name, summary in costs.items()
        ]
        out.append((f"{label(metric)} by cost", named_points(pairs, "MFLOP per example (log scale)", label(metric))))
    figures = "".join(f"<section><h3>{escape(title)}</h3>{labelled_svg(svg, title)}</section>" for title, svg in out)
    return f'<div class="figures">{figures}</div>' if out else ""


def _commands(cells: Sequence[Cell]) -> str:
    """Commands to reproduce the trials of the first seed."""
    lines: list[str] = []
    for cell in cells:
        if cell.trial.seed == 0:
            lines += [f"python -m {' '.join(command)}" for command in cell.trial.commands]
    text = escape("\n".join(dict.fromkeys(lines)))
    return f'<details><summary>Commands</summary><pre tabindex="0" class="scroll">{text}</pre></details>'


# ---------------------------------------------------------------------------------------------
# Files


def _csv_name(experiment: Experiment, log: Log) -> str:
    return f"{experiment.name}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', log.name).strip('-')}.csv"


def _csv(experiment: Experiment, estimates: Estimates) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["variant", "metric", "mean", "spread", "reference", "difference", "low", "high", "p", "best_share"]
    )
    for variant in experiment.variants:
        against = reference(experiment, variant)
        for metric in experiment.metrics:
            e = estimates[variant.name, metric]
            writer.writerow(
                [variant.name, metric, e.mean, e.spread, against, e.difference, e.low, e.high, e.p, e.share_of_best]
            )
    return out.getvalue()


def _markdown(results: Sequence[LogResult]) -> str:
    lines = [f"## {results[0].experiment.question}", ""]
    for result in results:
        experiment, log, cells, estimates = result
        shown = [
            m for m in experiment.metrics if any(estimates[v.name, m].mean is not None for v in experiment.variants)
        ]
        lines += [
            f"**{log.name}**",
            "",
            f"| variant | {' | '.join(map(label, shown))} |",
            "|---" * (len(shown) + 1) + "|",
        ]
        for variant in experiment.variants:
            lines.append(f"| {variant.name} | {' | '.join(_cell(estimates, variant.name, m) for m in shown)} |")
        lines += ["", _answer(result), ""]
        for source, header, rows in _published(experiment, cells):
            lines += [f"Not comparable: {source}.", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
            lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(lines)


def _trials_page(rows: Sequence[dict[str, Any]]) -> str:
    names = [
        "experiment",
        "data",
        "variant",
        "seed",
        "state",
        "best_epoch",
        "seconds",
        "examples_per_second",
        "parameters",
    ]
    lines = []
    for row in rows:
        values = [row.get(name) for name in names]
        texts = ["–" if v is None else f"{v:,.0f}" if isinstance(v, float) else str(v) for v in values]
        lines.append(([*texts, row.get("error") or ""], row["state"] == "failed"))
    return f"<section>{html_table([*names, 'error'], lines, label='trials')}</section>"
