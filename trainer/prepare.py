"""Before any worker starts: check data and options, settle the configuration, refuse what differs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from etl.contract import CLICKED, Dataset, feedback_labels, open_dataset
from etl.folder import InputError
from trainer.config import TrainerConfig, load, with_recipe
from trainer.data.batch import feedback_rows
from trainer.data.reader import EXPOSURE_COLUMNS, SESSION_COLUMNS, Sessions
from trainer.loop import has_exposures, is_finished

CONFIG = "config.yaml"
MAY_CHANGE = ("ray.", "train.epochs", "resume", "data", "output")
"""Options that a resumed run may change; `data` since it is compared by content."""


def prepare(options: Sequence[str]) -> tuple[TrainerConfig, bool]:
    """The settled configuration of a run, written to its folder, and whether the run is finished.

    Raises:
        InputError: options, dataset or output that the user must mend.
    """
    given = load(options)
    output = Path(given.output)
    dataset = open_dataset(given.data)
    config = with_recipe(options, dataset.manifest.n_items)
    config.data, config.output = str(Path(config.data).absolute()), str(output.absolute())
    if dataset.manifest.counts["sessions"] == 0:
        raise InputError("a dataset with sessions", "none", "lower protocol.min_clicks when making it")
    config.tasks = ["next", *trainable(dataset, config.feedback_tasks)]
    settled = {**config.plain(), "dataset": dataset.manifest.fingerprint}
    path = output / CONFIG
    if path.is_file():
        _compare(OmegaConf.to_container(OmegaConf.load(path)), settled, resume=config.resume)
        more_epochs = config.train.epochs > OmegaConf.load(path).train.epochs
        if is_finished(output) and not more_epochs:
            return config, True
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("a fresh output folder, or a run to resume", output, "give another output")
    output.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(settled)))
    temporary.replace(path)
    return config, False


def _compare(before: Any, now: dict[str, Any], *, resume: str) -> None:
    """Raise `InputError` where a run cannot go on with another configuration or dataset."""
    cure = "give another output, or the options of before"
    if resume == "never":
        raise InputError("a fresh output folder with resume=never", "a run", "give another output, or resume=auto")
    old, new = _flat(before), _flat(now)
    for name in sorted(old.keys() | new.keys()):
        if name.startswith(MAY_CHANGE) and name != "dataset":
            continue
        if old.get(name) != new.get(name):
            raise InputError(f"{name}={old.get(name)} as the run began with", new.get(name), cure)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def trainable(dataset: Dataset, tasks: list[str]) -> list[str]:
    """The feedback tasks with both classes among the train rows; a warning for each other one."""
    exposures = has_exposures(dataset)
    columns = SESSION_COLUMNS + (EXPOSURE_COLUMNS if exposures else [])
    seen = {task: set[int]() for task in tasks}
    for entry in dataset.session_files:
        if all(len(classes) == 2 for classes in seen.values()):
            break
        with pq.ParquetFile(dataset.file(entry.path)) as file:
            for group in range(file.num_row_groups):
                sessions = Sessions.of(file.read_row_group(group, columns=columns))
                rows = feedback_rows(sessions, exposures=exposures)
                train = rows.position <= sessions.items.lengths[rows.session] - 3
                for bits in np.unique(rows.feedback[train] | (0 if exposures else CLICKED)):
                    for task, classes in seen.items():
                        classes.add(int(feedback_labels(int(bits), task)))
    for task, classes in seen.items():
        if len(classes) < 2:
            what = "only one class" if classes else "no rows"
            print(f"warning: task {task} is dropped: {what} in train", flush=True)
    return [task for task, classes in seen.items() if len(classes) == 2]
