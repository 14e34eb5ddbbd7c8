"""Signal handling: on SIGTERM every worker stops after the same step and a checkpoint is saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from trainer.distributed.world import World
from trainer.run.run_folder import RunFolder

STOP = ".stop"
STATUS = 128 + signal.SIGTERM
"""Exit status of a stopped run: not 0, since the run is not finished."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C."""
AGREE_STEPS = 8
"""Steps between all-reduces of the stop flag; the run folder is polled once a second, to spare shared storage."""
LOOK_SECONDS = 1.0


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    """The run was asked to stop and has saved its state."""


@contextmanager
def on_sigterm(run: RunFolder) -> Iterator[None]:
    """Ask all workers of a run, on any machine, to stop when this process receives SIGTERM.

    The request is a file in the shared run folder. Signal handlers work in the main thread only.
    """
    run.remove(STOP)

    def ask(_signal: int, _frame: FrameType | None) -> None:
        (run.path / STOP).touch()
        run.send(STOP)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        run.remove(STOP)


@contextmanager
def interrupted_plainly() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, although Ray's handler exits silently with status 0."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def stop_requested(run: RunFolder, world: World) -> bool:
    """Whether the run was asked to stop; collective, all workers get the same answer."""
    return _any_worker(world.is_first and run.has(STOP), world)


def _any_worker(requested: bool, world: World) -> bool:
    return bool(world.sum(torch.tensor(float(requested), device=world.device)))


class StopWatch:
    """Checks after every step whether to stop; all workers get the same answer."""

    def __init__(self, run: RunFolder, world: World) -> None:
        self.run, self.world, self.looked = run, world, 0.0
        self.pause = LOOK_SECONDS * (5 if run.mirror else 1)

    def __call__(self, step: int) -> bool:
        """Whether to stop after `step`, counted from the start of the run."""
        if step % AGREE_STEPS:
            return False
        requested = False
        if self.world.is_first and time.monotonic() - self.looked >= self.pause:
            self.looked = time.monotonic()
            requested = self.run.has(STOP)
        return _any_worker(requested, self.world)
