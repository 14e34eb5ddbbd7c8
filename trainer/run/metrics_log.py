"""The metrics log of a run: metrics.jsonl, TensorBoard and the progress line."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.runtime.files import atomic_file
from etl.runtime.progress import ProgressLine, progress_line
from trainer.run.progress import Progress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PROGRESS = ".progress.json"
METRICS = "metrics.jsonl"
LINE_KEYS = {"step", "epoch", "split", "name", "value"}
RECENT_SECONDS, MARKS = 60.0, 12
"""Window of the displayed rate, and the number of measurements in it."""


class RunLog:
    """Writes a run's metrics. On resume, drops the lines of steps that will be repeated.

    Args:
        run: the run folder.
        step: global step at which the phase starts or resumes.
        epoch: epochs completed by then; lines about the end of a later one are dropped too.
        refit: whether the phase is the refit, which counts steps from 0 again.
    """

    def __init__(self, run: Path, step: int, epoch: int, *, refit: bool) -> None:
        self.run, self.last_shown, self.first_step = run, 0.0, step + 1
        self.path = run / METRICS
        lines = read_metrics(self.path)

        def is_kept(line: dict[str, Any]) -> bool:
            if line["split"].startswith("refit") != refit:
                return True
            at_end = line["split"] == "valid" or line["split"].endswith("-epoch")
            return line["step"] <= step and not (at_end and line["epoch"] > epoch)

        lines_before = [line for line in lines if is_kept(line)]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines_before))

    @cached_property
    def board(self) -> SummaryWriter:
        """TensorBoard's writer, created lazily: its import takes as long as many steps of a small run."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.run / "tensorboard"), purge_step=self.first_step)

    def write(self, step: int, epoch: int, split: str, values: Mapping[str, float | None]) -> None:
        """Append one line per value."""
        with self.path.open("a") as stream:
            for name, value in values.items():
                line = {"step": step, "epoch": epoch, "split": split, "name": name, "value": value}
                stream.write(json.dumps(line) + "\n")
                if value is not None:
                    self.board.add_scalar(f"{split}/{name}", value, step)

    def progress(self, **values: Any) -> None:
        """Report progress to the launching process, at most twice a second."""
        if time.monotonic() - self.last_shown < 0.5:
            return
        self.last_shown = time.monotonic()
        with atomic_file(self.run / PROGRESS) as file:
            file.write_text(json.dumps(values))

    def close(self) -> None:
        """Close the TensorBoard file."""
        self.board.close()
        (self.run / PROGRESS).unlink(missing_ok=True)


class Meter:
    """Measures the throughput of an epoch on one worker.

    Args:
        unit: what is counted, clicks or rows.
        total: target clicks of the epoch; for rows, whose number is not known, the number of sessions with them.
        epochs: number of epochs of the phase.
        done: clicks or rows of the epoch done before a resume.
    """

    def __init__(self, unit: str, total: int, epochs: int, done: float) -> None:
        self.unit, self.total, self.epochs, self.done = unit, total, epochs, done
        self.begin = self.last = time.perf_counter()
        self.marks = deque([(self.begin, done)])

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def values(self, progress: Progress, waited: float) -> dict[str, Any]:
        """Values for the progress bar; `waited` is the time in seconds spent waiting for batches."""
        now, done = time.perf_counter(), progress.loss_counts[0]
        seconds = max(now - self.begin, 1e-9)
        if now - self.marks[-1][0] >= RECENT_SECONDS / MARKS:
            self.marks.append((now, done))
        while len(self.marks) > MARKS:
            self.marks.popleft()
        since, before = self.marks[0]
        return {
            "epoch": progress.epoch + 1,
            "epochs": self.epochs,
            "done": done,
            "total": self.total if self.unit == "clicks" else done * self.total / max(progress.sample, 1),
            "unit": self.unit,
            "rate": (done - self.done) / seconds,
            "recent_rate": (done - before) / max(now - since, 1e-9),
            "loss": progress.loss_sums[0] / max(done, 1.0),
            "waiting": waited / seconds,
        }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, up to the first that is truncated or damaged."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_bytes().splitlines():
            try:
                line = json.loads(text.decode())
            except ValueError:
                break
            if not isinstance(line, dict) or not line.keys() >= LINE_KEYS:
                break
            lines.append(line)
    return lines


@contextmanager
def progress_bar(run: Path) -> Iterator[None]:
    """Print each epoch's validation while the block runs, and on a terminal a progress bar."""
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
        ended = stop.wait(0.5)
        lines = valid_lines(run)
        for epoch in lines[epochs:]:
            line.say(epoch)
        epochs = len(lines)
        with suppress(OSError, ValueError, KeyError):  # missing, incomplete, or of another version
            line.show(epoch_line(json.loads((run / PROGRESS).read_text())))
    line.close()


def valid_lines(run: Path) -> list[str]:
    """One line for each epoch's validation so far."""
    epochs: dict[int, list[str]] = {}
    for line in read_metrics(run / METRICS):
        if line["split"] == "valid" and line["value"] is not None:
            epochs.setdefault(line["epoch"], []).append(f"{line['name']} {line['value']:.4f}")
    return [f"epoch {epoch}: valid {'  '.join(values)}" for epoch, values in epochs.items()]


def epoch_line(values: dict[str, Any]) -> str:
    """Progress line of an epoch, with its loss and the share of time spent waiting for data.

    >>> values = {"epoch": 1, "epochs": 3, "done": 2500, "total": 10000, "unit": "clicks"}
    >>> values |= {"recent_rate": 1250.0, "loss": 6.12, "waiting": 0.03}
    >>> epoch_line(values)
    'epoch 1/3: 2,500/10,000 clicks, 1,250 clicks/s, 6 s left, loss 6.120, waiting 3%'
    """
    note = f"loss {values['loss']:.3f}, waiting {values['waiting']:.0%}"
    what = f"epoch {values['epoch']}/{values['epochs']}"
    return progress_line(what, values["done"], values["total"], values["unit"], values["recent_rate"], note)


def mean_losses(tasks: list[str], loss_sums: list[float], counts: list[float]) -> dict[str, float]:
    """Mean loss by task, with the log's names."""
    return {f"loss/{t}": s / max(c, 1.0) for t, s, c in zip(tasks, loss_sums, counts, strict=True)}
