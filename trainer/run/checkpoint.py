"""Checkpoints: atomic, without pickles, retaining the last few and the best.

With a sharded table each worker writes its own file, next to that of the networks. Rows keep their ids of the complete
table, so that any number of workers can resume, with a sharded or replicated table.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from etl.runtime.errors import InputError
from etl.runtime.files import atomic_folder, sha256_of, sync_to_disk
from trainer.models.embedding_table import FULL_TABLE, Shard, SparseTable
from trainer.run.progress import Progress
from trainer.training.step import TrainStep

STATE = "state.json"
TENSORS = "tensors.safetensors"
SHARD = "table-{:05d}.safetensors"
"""File of a worker's rows with a sharded table."""
ROWS_AT_ONCE = 65_536
"""Rows of a table read at a time."""


class Writer:
    """Writes checkpoints asynchronously, one at a time; called by all workers.

    With a sharded table every worker writes its own rows synchronously, to avoid a copy.

    Args:
        folder: folder of the checkpoints.
        keep: number of latest checkpoints to retain in addition to the best.
        after: called after each checkpoint is written.
    """

    def __init__(self, folder: Path, keep: int, after: Callable[[], None] = lambda: None) -> None:
        self.folder, self.keep, self.after = folder, keep, after
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, train_step: TrainStep, progress: Progress) -> None:
        """Copy the state and write it in the background, after waiting for the previous checkpoint."""
        self.wait()
        if train_step.sharded:
            write_sharded(self.folder, train_step, progress, keep=self.keep)
            return
        if not train_step.world.is_first:
            return
        tensors, now = {name: t.clone() for name, t in all_tensors(train_step).items()}, replace(progress)
        self.thread = threading.Thread(target=self._write, args=(tensors, now))
        self.thread.start()

    def _write(self, tensors: dict[str, torch.Tensor], progress: Progress) -> None:
        try:
            write(self.folder, tensors, progress, keep=self.keep)
            self.after()
        except BaseException as error:  # re-raised by `wait` in the training thread
            self.error = error

    def wait(self) -> None:
        """Wait for the current write. A full disk loses that checkpoint with a warning, but does not end the run."""
        if self.thread:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error is None:
            return
        if not _is_full_disk(error):
            raise error
        _warn_of_full_disk()


def _is_full_disk(error: BaseException) -> bool:
    return os.strerror(errno.ENOSPC) in str(error)


def _warn_of_full_disk() -> None:
    print("warning: no room on the disk for a checkpoint; the one before is kept", file=sys.stderr, flush=True)


def write(folder: Path, tensors: dict[str, torch.Tensor], progress: Progress, *, keep: int) -> None:
    """Write a state atomically as `folder/step-…`, then prune old checkpoints."""
    with atomic_folder(folder / f"step-{progress.step:09d}", sync=True) as writing:
        save_file(tensors, writing / TENSORS)
        state = {"progress": asdict(progress), "sha256": sha256_of(writing / TENSORS)}
        (writing / STATE).write_text(json.dumps(state))
    _prune(folder, progress, keep)


def write_sharded(folder: Path, train_step: TrainStep, progress: Progress, *, keep: int) -> None:
    """Collective write: each worker writes the rows that it owns, the first one also the networks and the progress.

    Raises:
        OSError: on the worker whose disk fails, after all have finished; a full disk is only a warning.
    """
    world, path = train_step.world, folder / f"step-{progress.step:09d}"
    writing = path.with_name(f".{path.name}.writing")
    if world.is_first:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    world.barrier()
    name, error, sha256 = SHARD.format(world.global_rank), None, ""
    try:
        save_file(table_tensors(train_step), writing / name)
        sync_to_disk(writing / name)
        sha256 = sha256_of(writing / name)
        if world.is_first:
            save_file(network_tensors(train_step), writing / TENSORS)
            sync_to_disk(writing / TENSORS)
    except (OSError, SafetensorError) as raised:
        error = raised
    shards = world.gather(sha256)
    if world.is_first and all(shards) and error is None:
        try:
            state = {"progress": asdict(progress), "sha256": sha256_of(writing / TENSORS), "shards": shards}
            (writing / STATE).write_text(json.dumps(state))
            sync_to_disk(writing / STATE)
            shutil.rmtree(path, ignore_errors=True)
            writing.rename(path)
            sync_to_disk(folder)
        except OSError as raised:
            error = raised
    if world.is_first:
        _prune(folder, progress, keep)  # incomplete checkpoints too
    failed = any(world.gather(error is not None))
    if error is not None and not _is_full_disk(error):
        raise error
    if failed and world.is_first:
        _warn_of_full_disk()


def _prune(folder: Path, progress: Progress, keep: int) -> None:
    """Remove incomplete checkpoints and damaged ones of later steps, then all but the latest and the best."""
    for path in folder.glob(".step-*.writing"):
        shutil.rmtree(path, ignore_errors=True)
    now = f"step-{progress.step:09d}"
    paths = sorted(folder.glob("step-*"))
    written = [path for path in paths if path.name <= now]
    best = {f"step-{step:09d}" for step in progress.best_steps}
    if progress.best_step in lost_steps(folder, progress):
        best |= {path.name for path in _best_of(written)}
    for path in [*paths[len(written) :], *written[:-keep]]:
        if path.name not in best:
            shutil.rmtree(path, ignore_errors=True)


def _best_of(paths: list[Path]) -> list[Path]:
    """The checkpoint of the epoch with the highest score, in a list; empty if there is no epoch's end."""
    scores = dict[Path, float]()
    for path in paths:
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged one
            progress = read_progress(path)
            if progress.sample == 0:
                scores[path] = progress.score
    return sorted(scores, key=lambda path: scores[path])[-1:]


def lost_steps(folder: Path, progress: Progress) -> set[int]:
    """Steps of the best epochs whose checkpoints a full disk has lost."""
    return {step for step in progress.best_steps - {0} if not (folder / f"step-{step:09d}").is_dir()}


def latest(folder: Path) -> Path | None:
    """The newest intact checkpoint; damaged ones are reported and skipped."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = problem_of(path)
        if problem is None:
            return path
        print(f"checkpoint {path.name} is broken ({problem}); taking the one before", file=sys.stderr, flush=True)
    return None


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is intact."""
    try:
        state = json.loads((path / STATE).read_text())
        Progress(**state["progress"])
        shards = {SHARD.format(rank): sha256 for rank, sha256 in enumerate(state.get("shards", ()))}
        for name, sha256 in {TENSORS: state["sha256"], **shards}.items():
            if sha256_of(path / name) != sha256:
                return "its tensors are not those that were written"
            with safe_open(path / name, "pt"):  # checks the header against the file size
                pass
        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return str(error)


def load_best(folder: Path, step: int, train_step: TrainStep) -> None:
    """Load the best epoch's checkpoint.

    Raises:
        InputError: it is missing or damaged.
    """
    path = folder / f"step-{step:09d}"
    problem = problem_of(path) if path.is_dir() else "none"
    if problem:
        hint = f"remove {folder} and train again"
        raise InputError(f"the checkpoint of the best epoch, {path.name}, as it was written", problem, hint)
    load(path, train_step)


def load(path: Path, train_step: TrainStep) -> Progress:
    """Load a checkpoint.

    Raises:
        InputError: the model's sizes differ.
    """
    try:
        with torch.no_grad():
            _load_networks(train_step, path / TENSORS)
            sources = _sources(path)
            _check_tables(train_step, sources[0][1])
            for name, table in train_step.tables.items():
                for shard, file in sources:
                    _load_rows(table, f"table.{name}.", shard, file)
    except (KeyError, RuntimeError, SafetensorError) as error:
        problem = str(error).splitlines()[0]
        raise InputError(f"a checkpoint of this model in {path}", problem, "was config.yaml edited?") from None
    return read_progress(path)


def read_progress(path: Path) -> Progress:
    """The training progress at a checkpoint."""
    return Progress(**json.loads((path / STATE).read_text())["progress"])


def all_tensors(train_step: TrainStep) -> dict[str, torch.Tensor]:
    """Networks, tables (of a sharded one the local rows) and optimiser state, by name."""
    return network_tensors(train_step) | table_tensors(train_step)


def table_tensors(train_step: TrainStep) -> dict[str, torch.Tensor]:
    """Tables and their optimiser state, by name."""
    tables = train_step.tables.items()
    tensors = {f"table.{of}.{name}": t for of, table in tables for name, t in table.tensors().items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def network_tensors(train_step: TrainStep) -> dict[str, torch.Tensor]:
    """Networks and their optimiser state, by name."""
    tensors = {f"network.{name}": p.detach() for name, p in train_step.objective.named_parameters()}
    for name, parameter in train_step.objective.named_parameters():
        for key, value in train_step.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _load_networks(train_step: TrainStep, path: Path) -> None:
    """Load the networks from a file.

    Raises:
        RuntimeError: the file is for other networks.
    """
    with safe_open(path, "pt") as file:
        names = {name.removeprefix("network.") for name in file.keys() if name.startswith("network.")}  # noqa: SIM118
        _check_same(names, set(dict(train_step.objective.named_parameters())))
        for name, parameter in train_step.objective.named_parameters():
            parameter.copy_(file.get_tensor(f"network.{name}"))
            for key, value in train_step.optimizer.state[parameter].items():
                value.copy_(file.get_tensor(f"optimizer.{name}.{key}"))


def _check_same(names: set[str], expected: set[str]) -> None:
    """Raise a RuntimeError unless a checkpoint holds the parts that the model has, and no others."""
    if names - expected:
        raise RuntimeError(f"{min(names - expected)} is in the checkpoint only")
    if expected - names:
        raise RuntimeError(f"{min(expected - names)} is not in the checkpoint")


def _check_tables(train_step: TrainStep, path: Path) -> None:
    """Raise a RuntimeError unless a file of rows is of the tables that the model has."""
    with safe_open(path, "pt") as file:
        names = {name.split(".")[1] for name in file.keys() if name.startswith("table.")}  # noqa: SIM118
    _check_same({f"table {name}" for name in names}, {f"table {name}" for name in train_step.tables})


def _sources(path: Path) -> list[tuple[Shard, Path]]:
    """Table files of a checkpoint, with the shard that each contains."""
    shards = len(json.loads((path / STATE).read_text()).get("shards", ()))
    files = [(Shard(rank, shards), path / SHARD.format(rank)) for rank in range(shards)]
    return files or [(FULL_TABLE, path / TENSORS)]


def _load_rows(table: SparseTable, prefix: str, source: Shard, path: Path) -> None:
    """Load the rows that the table holds from a file, block by block.

    Raises:
        RuntimeError: the table's sizes differ.
    """
    held = source.ids(table.n_rows)
    with safe_open(path, "pt") as file:
        for name, tensor in table.tensors().items():
            rows = file.get_slice(prefix + name)
            expected = [len(held) if table.has_bias or not name.startswith("bias") else 0, *tensor.shape[1:]]
            if rows.get_shape() != expected:
                raise RuntimeError(f"{prefix}{name} of shape {rows.get_shape()}, expected {expected}")
            for begin in range(0, expected[0], ROWS_AT_ONCE):
                ids = held[begin : begin + ROWS_AT_ONCE]
                here = ids % table.shard.size == table.shard.rank
                if here.any():
                    part = rows[begin : begin + len(ids)][here]
                    tensor[table.shard.local(ids[here])] = part.to(tensor.device)
