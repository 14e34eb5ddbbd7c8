"""The progress line of a run: its first worker writes the file, the launching process shows it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from etl.runtime.files import atomic_file
from etl.runtime.progress import ProgressLine, progress_line
from trainer.distributed.world import World
from trainer.run.metrics_log import METRICS, read_metrics
from trainer.run.run_folder import RunFolder

PROGRESS = ".progress.json"
SECONDS = 0.5
"""Minimum seconds between two writes, and between two reads."""


class ProgressFile:
    """Writes what a run is doing; the file exists while the run does it.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.path, self.what, self.written = run / PROGRESS, "", 0.0

    def write(self, what: str, done: float = 0, total: float | None = None, unit: str = "", **more: Any) -> None:
        """Report progress, at most twice a second.

        Args:
            what: what the run does, for example `epoch 1/3`.
            done, total, unit: how much of it.
            more: `rate` and `note` of `progress_line`; without `rate` the reader measures it.
        """
        if what == self.what and time.monotonic() - self.written < SECONDS:
            return
        self.what, self.written = what, time.monotonic()
        with atomic_file(self.path) as file:
            file.write_text(json.dumps({"what": what, "done": done, "total": total, "unit": unit, **more}))

    def remove(self) -> None:
        """Remove the file: the run has ended."""
        self.path.unlink(missing_ok=True)


@contextmanager
def reporting(run: RunFolder, world: World) -> Iterator[World]:
    """The first worker, reporting its progress in the run folder while the block runs."""
    file = ProgressFile(run.path)
    file.write("preparing")
    try:
        yield replace(world, report=file.write)
    finally:
        file.remove()


@contextmanager
def progress_bar(run: Path) -> Iterator[None]:
    """Print each epoch's validation while the block runs, and show the run's progress."""
    ProgressFile(run).remove()  # of a killed process
    stop = threading.Event()
    thread = threading.Thread(target=_show, args=(run, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _show(run: Path, stop: threading.Event) -> None:
    line, epochs, ended = ProgressLine(), len(valid_lines(run)), False
    while not ended:
        ended = stop.wait(SECONDS)
        lines = valid_lines(run)
        for epoch in lines[epochs:]:
            line.say(epoch)
        epochs = len(lines)
        with suppress(OSError, ValueError, TypeError):  # missing, incomplete, or of another version
            values = json.loads((run / PROGRESS).read_text())
            if "rate" in values:
                line.show(progress_line(**values))
            else:
                line.update(**values)
    line.close()


def valid_lines(run: Path) -> list[str]:
    """One line for each epoch's validation so far."""
    epochs: dict[int, list[str]] = {}
    for line in read_metrics(run / METRICS):
        if line["split"] == "valid" and line["value"] is not None:
            epochs.setdefault(line["epoch"], []).append(f"{line['name']} {line['value']:.4f}")
    return [f"epoch {epoch}: valid {'  '.join(values)}" for epoch, values in epochs.items()]
