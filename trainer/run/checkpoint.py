"""Checkpoints: complete or absent, without pickles, the last few and the best kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from etl.runtime.errors import InputError
from etl.runtime.files import atomic_folder, sha256_of
from trainer.training.step import TrainStep

STATE = "state.json"
TENSORS = "tensors.safetensors"


@dataclass
class Progress:
    """Where a run stands; all of it plain numbers.

    Attributes:
        step: global steps taken.
        epoch: epochs completed.
        sample: samples of the epoch under way that are done, over all workers.
        loss_sums, loss_counts: of the epoch under way, by task.
        best_epoch, best_step, best_score: by the selecting valid metric; epoch 0 before the first validation.
        worse_epochs: epochs since then.
        seconds: spent training, over all starts.
        examples: target clicks trained on.
    """

    step: int = 0
    epoch: int = 0
    sample: int = 0
    loss_sums: list[float] = field(default_factory=list)
    loss_counts: list[float] = field(default_factory=list)
    best_epoch: int = 0
    best_step: int = 0
    best_score: float = -1.0
    worse_epochs: int = 0
    seconds: float = 0.0
    examples: int = 0

    def advance(self, sample: int, loss_sums: list[float], counts: list[float]) -> None:
        """A step more: samples of the epoch that are done now, the step's loss sums and counts."""
        self.step += 1
        self.sample = sample
        self.loss_sums = [a + b for a, b in zip(self.loss_sums, loss_sums, strict=True)]
        self.loss_counts = [a + b for a, b in zip(self.loss_counts, counts, strict=True)]
        self.examples += int(counts[0])


class Writer:
    """Writes checkpoints in a thread while training goes on, one at a time.

    Args:
        folder: of the checkpoints.
        keep: number of latest ones to retain in addition to the best.
        after: called once a checkpoint is written.
    """

    def __init__(self, folder: Path, keep: int, after: Callable[[], None] = lambda: None) -> None:
        self.folder, self.keep, self.after = folder, keep, after
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, train_step: TrainStep, progress: Progress) -> None:
        """Copy the state of a run and write it in the background, once the checkpoint before is written."""
        self.wait()
        tensors, now = {name: t.clone() for name, t in all_tensors(train_step).items()}, replace(progress)
        self.thread = threading.Thread(target=self._write, args=(tensors, now))
        self.thread.start()

    def _write(self, tensors: dict[str, torch.Tensor], progress: Progress) -> None:
        try:
            write(self.folder, tensors, progress, keep=self.keep)
            self.after()
        except BaseException as error:  # raised by `wait`, in the thread that trains
            self.error = error

    def wait(self) -> None:
        """Return once nothing is being written. A full disk costs that checkpoint and a warning, not the run."""
        if self.thread:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error is None:
            return
        if os.strerror(errno.ENOSPC) not in str(error):
            raise error
        print("warning: no room on the disk for a checkpoint; the one before is kept", file=sys.stderr, flush=True)


def write(folder: Path, tensors: dict[str, torch.Tensor], progress: Progress, *, keep: int) -> None:
    """Write a state as `folder/step-…` by one rename, then drop old checkpoints."""
    with atomic_folder(folder / f"step-{progress.step:09d}", sync=True) as writing:
        save_file(tensors, writing / TENSORS)
        state = {"progress": asdict(progress), "sha256": sha256_of(writing / TENSORS)}
        (writing / STATE).write_text(json.dumps(state))
    _prune(folder, progress, keep)


def _prune(folder: Path, progress: Progress, keep: int) -> None:
    result = sorted(folder.glob("step-*"))
    best = f"step-{progress.best_step:09d}"
    for path in result[:-keep]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step-*.writing"):
        shutil.rmtree(path, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is complete; broken ones are named and passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = problem_of(path)
        if problem is None:
            return path
        print(f"checkpoint {path.name} is broken ({problem}); taking the one before", file=sys.stderr, flush=True)
    return None


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is as it was written."""
    try:
        state = json.loads((path / STATE).read_text())
        Progress(**state["progress"])
        if sha256_of(path / TENSORS) != state["sha256"]:
            return "its tensors are not those that were written"
        with safe_open(path / TENSORS, "pt"):  # checks that the header fits the file
            return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return str(error)


def load_best(folder: Path, step: int, train_step: TrainStep) -> None:
    """Put the best epoch's checkpoint into a run.

    Raises:
        InputError: it is missing, or not as it was written.
    """
    path = folder / f"step-{step:09d}"
    problem = problem_of(path) if path.is_dir() else "none"
    if problem:
        hint = f"remove {folder} and train again"
        raise InputError(f"the checkpoint of the best epoch, {path.name}, as it was written", problem, hint)
    load(path, train_step)


def load(path: Path, train_step: TrainStep) -> Progress:
    """Put a checkpoint's state into a run.

    Raises:
        InputError: it is of a model of other sizes.
    """
    tensors = load_file(path / TENSORS)
    try:
        _load_tensors(train_step, tensors)
    except (KeyError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
        raise InputError(f"a checkpoint of this model in {path}", problem, "was config.yaml edited?") from None
    return read_progress(path)


def read_progress(path: Path) -> Progress:
    """Where the run stood at a checkpoint."""
    return Progress(**json.loads((path / STATE).read_text())["progress"])


def all_tensors(train_step: TrainStep) -> dict[str, torch.Tensor]:
    """Networks, tables and optimiser state, by name."""
    tensors = {f"network.{name}": p.detach() for name, p in train_step.objective.named_parameters()}
    for table, result in train_step.tables.items():
        tensors |= {f"table.{table}.{name}": t for name, t in result.tensors().items()}
    for name, parameter in train_step.objective.named_parameters():
        for key, value in train_step.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _load_tensors(train_step: TrainStep, tensors: dict[str, torch.Tensor]) -> None:
    for table, result in train_step.tables.items():
        result.load(_under(f"table.{table}.", tensors))
    for name, parameter in train_step.objective.named_parameters():
        parameter.copy_(tensors[f"network.{name}"])
        state = _under(f"optimizer.{name}.", tensors)
        for key, value in train_step.optimizer.state[parameter].items():
            value.copy_(state[key])


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
