"""Options of runs of a second or two, comparing two runs, and interrupting one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from retrieval.bundle import open_bundle
from trainer.run import signals
from trainer.run.checkpoint import TENSORS, latest
from trainer.training.step import TrainStep

SMALL = [
    "network.embedding_dim=8",
    "network.hidden_size=8",
    "network.experts=2",
    "network.tower=8",
    "train.batch_tokens=64",
    "train.negatives=20",
    "train.valid_sessions=30",
    "ray.workers=0",
    "train.epochs=3",
    "train.checkpoint_steps=5",
]
"""Options of a run of a second or two."""


def options(dataset, run: Path, *more: str) -> list[str]:
    return [f"data={dataset.path}", f"output={run}", "model=hybrid", *SMALL, *more]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(run / "checkpoints") / TENSORS)


def assert_same_run(a: Path, b: Path) -> None:
    left, right = final_tensors(a), final_tensors(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    bundles = [open_bundle(run / "bundle").manifest for run in (a, b)]
    assert [f.sha256 for f in bundles[0].files] == [f.sha256 for f in bundles[1].files]


class Killed(BaseException):
    """An exception that no run catches."""


@contextmanager
def killed_at_step(number: int) -> Iterator[None]:
    """Raise `Killed` at the `number`-th step of the training inside, which must not finish before."""
    taken, step = 0, TrainStep.step

    def counted(self, *arguments):
        nonlocal taken
        taken += 1
        if taken == number:
            raise Killed
        return step(self, *arguments)

    with mock.patch.object(TrainStep, "step", counted), pytest.raises(Killed):
        yield


@contextmanager
def terminated_at_step(number: int) -> Iterator[None]:
    """Send SIGTERM to the training inside at step `number`; it must exit with status 143."""
    step = TrainStep.step

    def asked(self, batch, now):
        if now == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, now)

    patches = mock.patch.object(TrainStep, "step", asked), mock.patch.object(signals, "LOOK_SECONDS", 0.0)
    with patches[0], patches[1], pytest.raises(SystemExit) as left:
        yield
    assert left.value.code == 143
