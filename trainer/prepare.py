"""Preparation before workers start: checks data and options, resolves the configuration, validates a resume."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from omegaconf import OmegaConf

from etl.dataset import CLICKED, SPLITS, TRAIN_HOLDOUT, Dataset, feedback_labels, open_dataset
from etl.runtime.errors import InputError
from etl.runtime.files import atomic_file, write_json
from etl.runtime.object_store import absolute
from etl.runtime.output_path import hidden_sibling
from retrieval.bundle_folder import BUNDLE, RUN_BUNDLE
from trainer.config import RANK_HEADS, TrainerConfig, load
from trainer.data.batch import feedback_rows
from trainer.data.item_features import check_columns, feature_codes, feedback_columns
from trainer.data.ranking_rows import ROW_COLUMNS, flat_rows
from trainer.data.reader import Sessions, session_columns
from trainer.distributed.worker_count import choose_workers
from trainer.recipe import with_recipe
from trainer.run.folder import CONFIG, SUMMARY, is_finished
from trainer.run.run_folder import RunFolder

RECIPE_CHOICE, RECIPE_TRIALS = "recipe_choice.json", ".recipes"
"""The outcome of `recipe=auto`, and the folder of its trials; both are written before the configuration."""
VOCABULARY = "item_features.json"
"""By column, the embedding row of each feature value, to compute the vector of a new item."""
RATE_ROWS = 1_000_000
MIN_CLICKS = TRAIN_HOLDOUT + 2
"""Minimum retained clicks of a training session: one input and one target, besides the held-out ones."""
LEGACY_DEFAULTS = {"train.feature_rate": 1.0}
"""Values that reproduce the behaviour of runs started before an option existed, if not its default."""
MAY_CHANGE_GROUPS = ("ray.", "auto.")
"""Prefixes of options that may change on resume."""
MAY_CHANGE = {"train.epochs", "train.table", "resume", "data", "output"}
"""Other options that may change on resume; `data` is compared by content instead."""


@contextmanager
def prepared(
    options: Sequence[str], loaded_config: TrainerConfig | None = None, *, wait_seconds: float = 30.0
) -> Iterator[tuple[TrainerConfig, bool]]:
    """Resolve the configuration of a run and write it to its folder, which is locked until the block ends.

    A refused command changes nothing in the folder, where another process may be training.

    Args:
        options: the command line.
        loaded_config: the result of `load(options)`, if already called.
        wait_seconds: how long to wait for another process to end.

    Yields:
        The configuration, and whether the run is finished; nothing is written then.

    Raises:
        InputError: options, dataset or output that the user must fix; another process writes to the run.
    """
    config, dataset = resolve_config(options, loaded_config)
    run = RunFolder.of(config.output)
    # Other options are refused and finished runs returned at once. Copies of a store are read below, once downloaded.
    if not run.mirror and _is_done(config, dataset, run):
        yield config, True
        return
    with run.locked(wait_seconds=wait_seconds):
        run.pull(checkpoints=False)
        done = _is_done(config, dataset, run)
        if not done:
            _write(config, dataset, run)
        yield config, done


def prepare(options: Sequence[str], loaded_config: TrainerConfig | None = None) -> tuple[TrainerConfig, bool]:
    """What `prepared` yields, without holding the lock."""
    with prepared(options, loaded_config) as (config, finished):
        return config, finished


def _is_done(config: TrainerConfig, dataset: Dataset, run: RunFolder) -> bool:
    """Whether a run is finished and not to be extended.

    Raises:
        InputError: the run began with other options or another dataset, or the folder has other content.
    """
    path = run.path / CONFIG
    if not path.is_file():
        check_output(run.path, dataset)
        return False
    before = read_config(path)
    _compare(before, _record(config, dataset), resume=config.resume)
    more_epochs = config.train.epochs > before["train"]["epochs"]
    return is_finished(run.path) and not more_epochs and _has_bundle(run)


def _write(config: TrainerConfig, dataset: Dataset, run: RunFolder) -> None:
    """Write the files that a run begins with; one that is extended is unfinished from here on."""
    choose_workers(config, dataset)
    run.remove(SUMMARY)
    with atomic_file(run.path / CONFIG) as file:
        file.write_text(OmegaConf.to_yaml(OmegaConf.create(_record(config, dataset))))
    if config.network.item_features:
        write_json(run.path / VOCABULARY, feature_codes(dataset, config.network.item_features)[1])
    run.send(CONFIG)


def _record(config: TrainerConfig, dataset: Dataset) -> dict[str, Any]:
    """The content of `config.yaml`."""
    return config.to_dict() | {"dataset": dataset.manifest.fingerprint}


def _has_bundle(run: RunFolder) -> bool:
    """Whether the run's bundle is complete: files of it may have been deleted since. A store's is not downloaded."""
    return bool(run.mirror) or BUNDLE.has_all_files(run.path / RUN_BUNDLE)


def check_output(output: Path, dataset: Dataset) -> None:
    """Raise `InputError` for an output inside the dataset, or in a folder with other content."""
    if output.absolute().is_relative_to(dataset.path.absolute()):
        raise InputError("an output outside the dataset", output, "name another output")
    ours = (RECIPE_CHOICE, RECIPE_TRIALS, hidden_sibling(output, "lock").name)
    if output.exists() and (not output.is_dir() or any(path.name not in ours for path in output.iterdir())):
        raise InputError("a fresh output folder, or a run to resume", output, "choose another output")


def read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration of a run as plain values; YAML tags for Python objects are rejected.

    Raises:
        InputError: the file cannot be read, or is not a configuration.
    """
    try:
        values = yaml.safe_load(path.read_text())
        train = values.get("train") if isinstance(values, dict) else None
        if isinstance(train, dict) and isinstance(train.get("epochs"), int):
            return dict(values)
        problem = "something else"
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = str(error).splitlines()[0]
    raise InputError(f"the configuration of a run in {path}", problem, "choose the folder of a run, or another output")


def resolve_config(options: Sequence[str], loaded_config: TrainerConfig | None = None) -> tuple[TrainerConfig, Dataset]:
    """The configuration of a command line, with its recipe and the values derived from the dataset.

    Args:
        options: the command line.
        loaded_config: the result of `load(options)`, if already called.

    Raises:
        InputError: options or a dataset that the user must fix.
    """
    loaded_config = loaded_config or load(options)
    dataset = open_dataset(loaded_config.data)
    config = with_recipe(options, dataset.manifest.n_items, loaded_config)
    config.data, config.output = (absolute(path) for path in (config.data, config.output))
    _check_data(config, dataset)
    shown = config.train.exposures and dataset.shows_exposures
    rates = train_rates(dataset, config.feedback_tasks, exposures=shown, clicked_only=config.model == "rank_esmm")
    config.tasks = [task for task in config.tasks if task == "next" or task in rates]
    if config.model == "rank_esmm" and "click" not in rates:
        print("warning: every row was clicked, so rank_esmm is rank_single here", file=sys.stderr, flush=True)
    if not config.tasks:
        raise InputError("a task with both outcomes in train", "none", "choose other tasks, or another dataset")
    config.train.positive_rates = rates | {
        task: rate for task, rate in config.train.positive_rates.items() if task in rates
    }
    network = config.network
    network.positions = network.positions or dataset.manifest.max_clicks
    if network.feedback_features is None and network.feedback_feature_dim and config.has_feedback_towers:
        read = feedback_columns(dataset, network.item_features)
        if read != network.item_features:  # null means item_features
            network.feedback_features = read
    return config, dataset


def _compare(before: Any, now: dict[str, Any], *, resume: str) -> None:
    """Raise `InputError` if a run cannot resume with this configuration or dataset.

    An option that did not exist when the run began may have the value that reproduces the former behaviour.
    """
    hint = "choose another output, or the options that the run began with"
    if resume == "never":
        raise InputError("a fresh output folder with resume=never", "a run", "choose another output, or resume=auto")
    defaults, old, new = _flat(TrainerConfig().to_dict()) | LEGACY_DEFAULTS, _flat(before), _flat(now)
    names = sorted(old.keys() | new.keys(), key=lambda name: (name != "recipe", name))  # a recipe sets other options
    for name in names:
        if name in MAY_CHANGE or name.startswith(MAY_CHANGE_GROUPS):
            continue
        began = old.get(name, defaults.get(name))
        if began != new.get(name):
            raise InputError(f"{name}={began} as the run began with", new.get(name), hint)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def _check_data(config: TrainerConfig, dataset: Dataset) -> None:
    """Raise `InputError` if the model cannot be trained on the dataset."""
    if dataset.row_files and not config.is_ranking_model:
        models = ", ".join(RANK_HEADS)
        raise InputError("a dataset of sessions", f"rows of scenario {dataset.manifest.scenario}", f"model={models}")
    if not dataset.row_files and dataset.manifest.counts["sessions"] == 0:
        raise InputError("a dataset with sessions", "none", "lower protocol.min_clicks when making it")
    if not config.is_ranking_model and dataset.manifest.n_items < 2:
        hint = "no other item can come next; a rank_… model scores feedback"
        raise InputError("a dataset of at least 2 items", dataset.manifest.n_items, hint)
    for name in ("item_features", "feedback_features"):
        check_columns(dataset, f"network.{name}", getattr(config.network, name) or [])
    if dataset.session_files:
        _check_targets(dataset)
    longest = config.network.positions
    if longest and longest < dataset.manifest.max_clicks:
        min_positions = dataset.manifest.max_clicks
        raise InputError(f"network.positions of at least {min_positions}", longest, "0 takes the dataset's")


def _check_targets(dataset: Dataset) -> None:
    """Raise `InputError` if no session has a training click: valid and test take the last two of each."""
    longest = 0
    for entry in dataset.session_files:
        clicks = pq.read_table(dataset.file(entry.path), columns=["n_clicks"])["n_clicks"].to_numpy()
        longest = max(longest, min(int(clicks.max(initial=0)), dataset.manifest.max_clicks))
        if longest >= MIN_CLICKS:
            return
    hint = "the last two clicks of each are held out; make the dataset from longer sessions"
    raise InputError(f"a session of at least {MIN_CLICKS} retained clicks to train on", f"at most {longest}", hint)


def train_rates(dataset: Dataset, tasks: list[str], *, exposures: bool, clicked_only: bool = False) -> dict[str, float]:
    """Share of positives in train of each feedback task; warns about and leaves out tasks with only one outcome.

    Counted over `RATE_ROWS` rows, or more until both outcomes of each task have been seen.

    Args:
        dataset: sessions or rows.
        tasks: the feedback tasks.
        exposures: whether feedback rows are the exposures, or the retained clicks only.
        clicked_only: whether an action counts only if the row was clicked, as in the labels of rank_esmm.
    """
    positives, rows = dict.fromkeys(tasks, 0), 0
    for bits in _train_feedback(dataset, exposures=exposures) if tasks else ():
        rows += len(bits)
        counted = bits[bits & CLICKED != 0] if clicked_only else bits
        for task in tasks:
            positives[task] += int(feedback_labels(counted, task).sum())
        if rows >= RATE_ROWS and all(0 < count < rows for count in positives.values()):
            break
    for task, count in positives.items():
        if not 0 < count < rows:
            what = "only one class" if rows else "no rows"
            print(f"warning: task {task} is dropped: {what} in train", file=sys.stderr, flush=True)
    return {task: count / rows for task, count in positives.items() if 0 < count < rows}


def _train_feedback(dataset: Dataset, *, exposures: bool) -> Iterator[Any]:
    """Outcome bits of the train rows, one row group at a time."""
    for entry in dataset.session_files or dataset.row_files:
        with pq.ParquetFile(dataset.file(entry.path)) as file:
            for group in range(file.num_row_groups):
                if dataset.row_files:
                    flat = flat_rows(file.read_row_group(group, columns=ROW_COLUMNS))
                    yield flat.feedback[flat.split == SPLITS.index("train")]
                    continue
                columns = session_columns(exposures=exposures)
                sessions = Sessions.of(file.read_row_group(group, columns=columns))
                rows = feedback_rows(sessions, exposures=exposures)
                yield rows.feedback[rows.position < sessions.items.lengths[rows.session] - TRAIN_HOLDOUT]
