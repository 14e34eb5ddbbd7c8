"""Hyperparameter search: trials of known and random settings, compared on valid."""

from __future__ import annotations

import json
import shlex
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from etl.dataset import open_dataset
from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from etl.runtime.locks import locked
from etl.runtime.object_store import absolute, is_remote
from etl.runtime.output_file import new_file
from etl.runtime.progress import ProgressLine
from trainer.config import load as load_trainer
from trainer.program_configs import TuneConfig
from trainer.recipe import with_recipe
from trainer.tuning.page import page
from trainer.tuning.space import command_line, default_space, read_space, settings
from trainer.tuning.trial import FINISHED, Trial

SEARCH, TABLE, BEST, PAGE = "search.json", "trials.parquet", "best.yaml", "trials.html"
MAY_CHANGE = ("trials", "hours", "cores", "output", "data")
"""Options that may change when a search is resumed; the dataset is compared by content."""
RESERVED = ("data", "output", "model", "resume", "train.epochs", "train.refit", "ray.workers")
"""Options of the trainer that the search sets."""


def search(config: TuneConfig) -> str:
    """Run all unfinished trials, write table, page and best setting; returns the text to print.

    Raises:
        InputError: invalid options, the folder of another search, or an error of the system such as a full disk.
    """
    folder = Path(config.output)
    if is_remote(config.output):
        raise InputError("a folder for output", config.output, "search on storage that all machines share")
    trials, metric = plan(config)
    with locked(folder):
        line = ProgressLine(every=10.0)

        def progress() -> None:
            ended = sum(bool(trial.ended()) for trial in trials)
            line.update(f"searching {config.model}", ended, len(trials), "trials")

        try:
            if not all(trial.ended() for trial in trials):
                from trainer.ray_tune import run_trials

                run_trials(trials, config, metric, config.hours, progress)
        finally:
            line.close()
        return write_findings(folder, trials, config, metric)


def plan(config: TuneConfig) -> tuple[list[Trial], str]:
    """The trials, and the validation metric of the comparison.

    All settings are validated before any is run.

    Raises:
        InputError: options that the trainer rejects, or the folder of another search.
    """
    folder, shared = Path(config.output).absolute(), shlex.split(config.options)
    taken = [option for option in shared if option.split("=")[0] in RESERVED]
    if taken:
        raise InputError("options that the search does not set", taken[0], "leave it out")
    fixed = [f"data={absolute(config.data)}", f"model={config.model}", f"train.epochs={config.epochs}", "ray.workers=0"]
    manifest = open_dataset(config.data, verify=False).manifest
    recipe = with_recipe([*fixed, f"output={folder}", *shared], manifest.n_items)
    space, known = read_space(config.space) if config.space else default_space(recipe), config.space is None
    trials = []
    for number, setting in enumerate(settings(config.model, space, config.trials, config.seed, known=known)):
        # Options set by the user take precedence over the space.
        free = {n: v for n, v in setting.items() if not any(option.startswith(f"{n}=") for option in shared)}
        path = folder / "trials" / f"{number:04d}"
        trials.append(Trial(number, path, free, [*fixed, f"output={path}", *shared, *command_line(free)]))
    configs = [load_trainer(trial.options) for trial in trials]
    _remember(folder, config, space, manifest.fingerprint)
    return trials, configs[0].select_by


def _remember(folder: Path, config: TuneConfig, space: Any, dataset: str) -> None:
    """Save the search's options, or compare them with the saved ones on resume."""
    record: dict[str, Any] = {n: v for n, v in asdict(config).items() if n not in MAY_CHANGE}
    record["space"] = {name: asdict(dimension) for name, dimension in space.items()}
    record["dataset"] = dataset
    path = folder / SEARCH
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError("a fresh output folder, or a search to continue", folder, "choose another output")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        return
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"the options of a search in {path}", error, "choose another output") from None
    for name in record:
        if before.get(name) != json.loads(json.dumps(record[name])):
            hint = "choose another output, or the options that the search began with"
            raise InputError(f"{name}={before.get(name)} as the search began with", record[name], hint)


def rows_of(trials: list[Trial], metric: str) -> list[dict[str, Any]]:
    """One row per trial, best first: state, epochs, the best epoch's validation metrics, cost and setting."""
    rows = []
    for trial in trials:
        epochs, ended = trial.epochs(), trial.ended()
        best = max(epochs, key=lambda epoch: epoch.get(metric, 0.0), default={})
        best = best | ({"epoch": ended["best_epoch"], **ended["valid"]} if trial.state == FINISHED else {})
        row = {"trial": trial.number, "state": trial.state, "epochs": len(epochs), "best_epoch": best.get("epoch")}
        row |= {"seconds": ended.get("seconds"), "parameters": ended.get("parameters"), "error": ended.get("error")}
        row |= {f"valid/{name}": value for name, value in best.items() if name != "epoch"}
        rows.append(row | {"options": " ".join(command_line(trial.setting))} | trial.setting)
    return sorted(rows, key=lambda row: (-(row.get(f"valid/{metric}") or 0.0), row["trial"]))


def write_findings(folder: Path, trials: list[Trial], config: TuneConfig, metric: str) -> str:
    """Write table, page and best setting; returns the text to print.

    Raises:
        InputError: no trial has a valid metric.
    """
    rows = rows_of(trials, metric)
    judged = [row for row in rows if row.get(f"valid/{metric}") is not None]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    with new_file(str(folder / TABLE)) as file:
        pq.write_table(pa.table({name: _column(values) for name, values in columns.items()}), file)
    if not judged:
        error = next((row["error"] for row in rows if row["error"]), "none has ended an epoch")
        raise InputError("a trial with a valid metric", error, "widen the space or the budget")
    best = trials[judged[0]["trial"]]
    with new_file(str(folder / BEST)) as file:
        file.write_text(yaml.safe_dump({"model": config.model, **_shared(config), **best.setting}, sort_keys=False))
    with new_file(str(folder / PAGE)) as file:
        file.write_text(page(config.model, metric, judged, len(trials)), encoding="utf-8")
    return _text(rows, judged, metric, folder, best)


def _shared(config: TuneConfig) -> dict[str, Any]:
    overrides = OverridesParser.create().parse_overrides(shlex.split(config.options))
    return {each.key_or_group: each.value() for each in overrides} | {"train.epochs": config.epochs}


def _column(values: list[Any]) -> pa.Array:
    """A column of one type: mixed types become text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and float in kinds:
        return pa.array([None if value is None else float(value) for value in values])
    return pa.array(values if len(kinds) <= 1 else [None if value is None else str(value) for value in values])


def _text(rows: list[dict[str, Any]], judged: list[dict[str, Any]], metric: str, folder: Path, best: Trial) -> str:
    values = [row[f"valid/{metric}"] for row in judged]
    states = {
        state: sum(row["state"] == state for row in rows) for state in dict.fromkeys(row["state"] for row in rows)
    }
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    spread = f"best {values[0]:.4f}, median {statistics.median(values):.4f}, worst {values[-1]:.4f}"
    again = [option for option in best.options if not option.startswith("output=")]
    lines = [f"{len(rows)} trials ({counts}): valid {metric} {spread}", f"{'trial':>5} {metric:>9} epoch  setting"]
    for row in judged[:5]:
        setting = row["options"] or "the recipe"
        lines.append(f"{row['trial']:>5} {row[f'valid/{metric}']:>9.4f} {row['best_epoch']:>5}  {setting}")
    lines += [f"table: {folder / TABLE}   page: {folder / PAGE}", "train the best one:"]
    return "\n".join([*lines, f"  python -m trainer {shlex.join([*again, 'output=RUN'])}"])
