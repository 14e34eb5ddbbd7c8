"""Runs a study: datasets, trials, results table, pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import StudyOptions, words
from cluster.study.experiment import Experiment, Variant
from cluster.study.experiments import EXPERIMENTS
from cluster.study.findings import row_of
from cluster.study.logs import Data, Log, logs_of, make_data
from cluster.study.site import write_site
from cluster.study.trials import Cell, StudyTrial, execute
from etl.runtime.errors import InputError
from etl.runtime.locks import locked
from etl.runtime.output_file import new_file

TABLE, SITE = "trials.parquet", "site"
WAIT_SECONDS = 3600.0


def run_study(options: StudyOptions) -> str:
    """Run all unfinished trials, and write table and site.

    Returns:
        Their paths, and the number of trials.

    Raises:
        InputError: invalid options or missing logs.
    """
    work = Path(options.work).absolute()
    experiments = chosen(options)
    logs = logs_of(options)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / "study", wait_seconds=WAIT_SECONDS):
        cells = []
        for log in logs:
            made: Datasets = {}
            cells += [cell for experiment in experiments for cell in cells_of(options, log, experiment, made)]
        trials = list({(cell.trial.run, cell.trial.result): cell.trial for cell in cells}.values())
        execute(trials, options.parallel, f"study {options.name}")
        rows = [row_of(cell) for cell in cells]
        write_table(work / TABLE, rows)
        pages = write_site(work / SITE, options.name, cells, rows)
    failed = sum(bool(trial.failure) for trial in trials)
    lines = [f"{len(trials)} trials, {failed} failed; table: {work / TABLE}", f"site: {pages}"]
    return "\n".join(lines)


def chosen(options: StudyOptions) -> list[Experiment]:
    """The requested experiments.

    Raises:
        InputError: an unknown name.
    """
    known = {experiment.name: experiment for experiment in EXPERIMENTS}
    for name in options.experiments:
        if name not in known:
            raise InputError(f"study.experiments of {', '.join(known)}", name, "leave it out for all")
    return [known[name] for name in options.experiments or known]


Datasets = dict[tuple[Any, ...], Data | None]
"""Datasets of a log by the options in which they differ; None if the log has no rows for it."""


def can_answer(log: Log, experiment: Experiment) -> bool:
    """Whether a log has the data that an experiment needs."""
    variants = experiment.variants
    if log.history or any(variant.history for variant in variants):
        return log.history is not None and any(variant.history for variant in variants)
    if any(variant.converter for variant in variants):
        return log.scenario.endswith("video")
    if experiment.flat_rows:
        return log.has_flat_rows
    return log.scenario != "ctr" and (log.is_generated or not experiment.generated)


def cells_of(options: StudyOptions, log: Log, experiment: Experiment, made: Datasets) -> list[Cell]:
    """The cells of an experiment on a log, with datasets built; empty if the log lacks the data."""
    if not can_answer(log, experiment):
        return []
    seeds = min(options.seeds, experiment.seeds or options.seeds)
    cells: list[Cell] = []
    for variant in experiment.variants:
        key = (variant.protocol, variant.scenario, variant.log, variant.converter, variant.history)
        if key not in made:
            made[key] = make_data(options, log, variant)
        data = made[key]
        if data is None:
            print(f"{experiment.name}: left out, {log.name} has too few of its rows", flush=True)
            return []
        if experiment.unclicked and not data.skipped:
            return []
        for seed in range(seeds):
            members = [cell.trial for name in variant.members for cell in cells if cell.is_of(name, seed)]
            cells.append(cell_of(options, data, experiment, variant, seed, tuple(members)))
    return cells


def cell_of(
    options: StudyOptions,
    data: Data,
    experiment: Experiment,
    variant: Variant,
    seed: int,
    members: tuple[StudyTrial, ...],
) -> Cell:
    """A variant with its trial. The study's common options come first, so that a variant's options win."""
    trainer = (*words("study.trainer", options.trainer), *variant.trainer) if not members else ()
    trial = StudyTrial(Path(options.work).absolute(), data, trainer, variant.retrieval, seed, members)
    return Cell(experiment, data, variant, trial)


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all rows to one Parquet file; columns that an experiment lacks are null."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with new_file(str(path)) as file:
        pq.write_table(pa.table({name: pa.array([row.get(name) for row in rows]) for name in names}), file)
