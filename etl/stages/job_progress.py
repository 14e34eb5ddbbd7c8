"""Progress of the sessions job, derived from the files written by its tasks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from etl.logs.splits import Split
from etl.runtime.progress import TERMINAL_SECONDS, ProgressLine
from etl.stages.task_files import Job

MEGABYTE = 1_000_000


class Stage:
    """The current stage of the job.

    Args:
        job: the job description.
        splits: splits of the log.
        starting: name of an engine that must start first, if any.
    """

    def __init__(self, job: Job, splits: list[Split], starting: str | None = None) -> None:
        self.job, self.starting = job, starting
        self.megabytes = [(split.end - split.begin) / MEGABYTE for split in splits]

    def started(self) -> None:
        """Record that the engine has started."""
        self.starting = None

    def report(self) -> tuple[str, float, float | None, str]:
        """The stage, how much of it is done, the total, and the unit."""
        if self.starting:
            return self.starting, 0, None, ""
        read = [int(path.stem) for path in self._files("splits", "json")]
        if len(read) < len(self.megabytes):
            return "reading", sum(self.megabytes[i] for i in read), sum(self.megabytes), "MB"
        written = len(list(Path(self.job.folder).glob("[rs]*s/part-*.parquet")))
        if written:
            return "writing", written, None, "files"
        rows = bool(self.job.scenario.history)
        done, n = len(self._files("kept" if rows else "cut", "json")), len(read) if rows else self.job.partitions
        if done < n:
            return ("sampling", done, n, "splits") if rows else ("cutting", done, n, "partitions")
        return "numbering items", 0, None, ""

    def _files(self, kind: str, suffix: str) -> list[Path]:
        return list(self.job.work_folder(kind).glob(f"[0-9]*.{suffix}"))


@contextlib.contextmanager
def reporting(job: Job, splits: list[Split], starting: str | None = None) -> Iterator[Stage]:
    """Show the progress of the job while the block runs; short jobs print nothing."""
    stop, stage, line = threading.Event(), Stage(job, splits, starting), ProgressLine()

    def show() -> None:
        while not stop.wait(TERMINAL_SECONDS if line.terminal else 2.0):
            line.update(*stage.report())
        line.close()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield stage
    finally:
        stop.set()
        thread.join()
