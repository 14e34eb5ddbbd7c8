"""The metrics log of a run, metrics.jsonl and TensorBoard, and its throughput."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.runtime.files import atomic_file
from trainer.run.progress import Progress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
        self.run, self.first_step = run, step + 1
        self.path = run / METRICS
        lines = read_metrics(self.path)

        def is_kept(line: dict[str, Any]) -> bool:
            if line["split"].startswith("refit") != refit:
                return True
            at_end = line["split"] == "valid" or line["split"].endswith("-epoch")
            return line["step"] <= step and not (at_end and line["epoch"] > epoch)

        lines_before = [line for line in lines if is_kept(line)]
        with atomic_file(self.path, sync=True) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in lines_before))

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

    def close(self) -> None:
        """Close the TensorBoard file."""
        self.board.close()


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

    def mean_rate(self, done: float) -> float:
        """Clicks or rows per second, without those before a resume; `done` are those of the epoch so far."""
        return (done - self.done) / max(time.perf_counter() - self.begin, 1e-9)

    def waiting_share(self, waited: float) -> float:
        """Share of the time spent waiting for batches, which is `waited` seconds."""
        return waited / max(time.perf_counter() - self.begin, 1e-9)

    def shown(self, progress: Progress, waited: float) -> dict[str, Any]:
        """Arguments of `progress_line`: the epoch, its rate in the last minute, mean loss and time spent waiting.

        Args:
            progress: of the run.
            waited: seconds spent waiting for batches.
        """
        now, done = time.perf_counter(), progress.loss_counts[0]
        if now - self.marks[-1][0] >= RECENT_SECONDS / MARKS:
            self.marks.append((now, done))
        while len(self.marks) > MARKS:
            self.marks.popleft()
        since, before = self.marks[0]
        loss = progress.loss_sums[0] / max(done, 1.0)
        return {
            "what": f"epoch {progress.epoch + 1}/{self.epochs}",
            "done": done,
            "total": self.total if self.unit == "clicks" else done * self.total / max(progress.sample, 1),
            "unit": self.unit,
            "rate": (done - before) / max(now - since, 1e-9),
            "note": f"loss {loss:.3f}, waiting {self.waiting_share(waited):.0%}",
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


def mean_losses(tasks: list[str], loss_sums: list[float], counts: list[float]) -> dict[str, float]:
    """Mean loss by task, with the log's names."""
    return {f"loss/{t}": s / max(c, 1.0) for t, s, c in zip(tasks, loss_sums, counts, strict=True)}
