"""Trials: a variant on a dataset with a seed, trained and evaluated once and shared between experiments.

A trial with members is an ensemble: nothing is trained, their models' scores are averaged.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.child import dies_with_parent
from cluster.study.experiment import Experiment, Variant
from cluster.study.logs import Data
from etl.runtime.errors import InputError
from etl.runtime.files import fingerprint_of, write_json
from etl.runtime.options import TRANSIENT_ERRORS
from etl.runtime.processes import n_cores
from etl.runtime.progress import ProgressLine
from retrieval.bundle_folder import RUN_BUNDLE
from retrieval.result_folder import METRICS, is_result
from trainer.run.folder import SUMMARY, is_finished

FAILED = "failed.json"
"""Marks a run whose options the trainer rejected; it is not retried."""
REFUSED = 2
"""Exit status of a program for invalid input or options."""
TRANSIENT = tuple(f"error: expected {what}" for what in TRANSIENT_ERRORS)
"""Beginnings of messages about a full disk or the like, after which a trial can be run again."""
FIXED = ("ray.workers=0", "auto.targets=0")
"""All runs train in one process with the catalogue size's first recipe, so that variants differ only in options."""


@dataclass(frozen=True)
class StudyTrial:
    """A training run with its evaluation.

    Attributes:
        work: folder of the study.
        data: dataset of the trial.
        trainer: options of `python -m trainer`, of study and variant.
        retrieval: options of `python -m retrieval`.
        seed: training seed.
        members: trials to ensemble; then there are no trainer options.
    """

    work: Path
    data: Data
    trainer: tuple[str, ...]
    retrieval: tuple[str, ...]
    seed: int
    members: tuple[StudyTrial, ...] = ()

    @cached_property
    def run(self) -> Path:
        """The run folder, shared by trials with equal options, data and seed."""
        if self.members:
            key = fingerprint_of([member.run.name for member in self.members])[:8]
            return self.work / "runs" / f"mean-{key}-seed-{self.seed}"
        key = fingerprint_of([self.data.fingerprint, list(self.trainer)])[:8]
        named = re.sub(r"[^a-z0-9]+", "-", self.trainer[-1] if len(self.trainer) == 1 else self.model)
        return self.work / "runs" / f"{named.removeprefix('model-')}-{key}-seed-{self.seed}"

    @property
    def model(self) -> str:
        """Name of the model."""
        return next(option for option in self.trainer if option.startswith("model=")).removeprefix("model=")

    @cached_property
    def result(self) -> Path:
        """The result folder, inside the run folder."""
        return self.run / f"result-{self._retrieval_key}"

    @cached_property
    def _retrieval_key(self) -> str:
        return fingerprint_of(list(self.retrieval))[:8]

    @property
    def _failed_evaluation(self) -> Path:
        """Marks an evaluation that was rejected; trials with other retrieval options share the run."""
        return self.run / f"failed-{self._retrieval_key}.json"

    @property
    def commands(self) -> list[list[str]]:
        """Commands for training (ensembles: averaging) and evaluation, arguments after `python -m`."""
        options = [f"data={self.data.path}", f"output={self.run}", f"seed={self.seed}", *FIXED, *self.trainer]
        evaluation = [f"bundle={self.run / RUN_BUNDLE}", f"data={self.data.path}", f"output={self.result}"]
        first = ["trainer", *options]
        if self.members:
            bundles = ",".join(str(member.run / RUN_BUNDLE) for member in self.members)
            first = ["retrieval.average", f"bundles=[{bundles}]", f"output={self.run / RUN_BUNDLE}"]
        return [first, ["retrieval", *evaluation, "overwrite=true", "threads=1", *self.retrieval]]

    @property
    def training_failure(self) -> str:
        """The error message if there is no model, as the trainer rejected its options; else empty."""
        return _read_error(self.run / FAILED)

    @property
    def failure(self) -> str:
        """The error message if a program rejected the trial; else empty."""
        return self.training_failure or _read_error(self._failed_evaluation)

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to run."""
        return bool(self.failure) or (self._has_bundle and is_result(self.result))

    @property
    def _has_bundle(self) -> bool:
        return (self.run / RUN_BUNDLE).exists() if self.members else is_finished(self.run)

    def execute(self) -> None:
        """Train and evaluate if not done; rejected options end only this trial.

        Raises:
            InputError: a program failed; includes its last line.
        """
        commands = [] if self.is_done else self.commands
        if self.members and self._has_bundle:
            commands = commands[1:]
        failed = [member.training_failure for member in self.members if member.training_failure]
        if failed:
            _write_error(self.run / FAILED, f"a member failed: {failed[0]}", [])
            return
        for command in commands:
            status, last_words = run_logged(command, self.work / "output" / f"{self.run.name}.log")
            if status == REFUSED and not last_words.startswith(TRANSIENT):
                is_evaluation = command[0] == "retrieval"
                _write_error(self._failed_evaluation if is_evaluation else self.run / FAILED, last_words, command)
                return
            if status:
                got = f"exit status {status}: {last_words}"
                raise InputError(f"python -m {' '.join(command)} to succeed", got, "run the study again: it resumes")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Summary of the training run; for an ensemble the summed costs of its members."""
        if self.members:
            parts = [member.summary for member in self.members]
            return {
                "valid": {},
                "parameters": {"total": sum(part["parameters"]["total"] for part in parts)},
                "flops_per_example": sum(part["flops_per_example"] for part in parts),
                "examples_per_second": 1 / sum(1 / part["examples_per_second"] for part in parts),
                "seconds": sum(part["seconds"] for part in parts),
                "best_epoch": None,
            }
        return dict(json.loads((self.run / SUMMARY).read_text()))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the evaluation."""
        return dict(json.loads((self.result / METRICS).read_text()))


def _read_error(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["error"])
    except (OSError, ValueError, KeyError):
        return ""


def _write_error(path: Path, error: str, command: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"error": error, "command": command})


def run_logged(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Run a program on one core with output to a file; returns its status and last line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        done = subprocess.run(
            dies_with_parent([sys.executable, "-m", *command]),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    lines = log.read_text(errors="replace").strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


@dataclass(frozen=True)
class Cell:
    """A cell of the tables: a trial in an experiment.

    Attributes:
        experiment, data, variant: position in the tables.
        trial: the trial with the results.
    """

    experiment: Experiment
    data: Data
    variant: Variant
    trial: StudyTrial

    def is_of(self, variant: str, seed: int) -> bool:
        """Whether it has this variant and seed."""
        return (self.variant.name, self.trial.seed) == (variant, seed)


def execute(trials: Sequence[StudyTrial], parallel: int, title: str) -> None:
    """Run all unfinished trials, `parallel` at a time; ensembles after all others.

    Raises:
        InputError: the first failure of a program, after running trials have finished.
    """
    left = [trial for trial in trials if not trial.is_done]
    line, lock, done = ProgressLine(every=30.0), threading.Lock(), len(trials) - len(left)

    def one(trial: StudyTrial) -> None:
        nonlocal done
        trial.execute()
        with lock:
            done += 1
            line.update(title, done, len(trials), "trials")

    def several(job: list[StudyTrial]) -> None:
        for trial in job:
            one(trial)

    with ThreadPoolExecutor(parallel or n_cores()) as pool:
        for with_members in (False, True):
            # Trials that share a run folder are one job, so that no two processes train in it.
            jobs: dict[Path, list[StudyTrial]] = {}
            for trial in left:
                if bool(trial.members) == with_members:
                    jobs.setdefault(trial.run, []).append(trial)
            futures: list[Future[None]] = [pool.submit(several, job) for job in jobs.values()]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
    line.close()
