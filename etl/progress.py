"""A line that says how far a long job is."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from etl.job import Job

WIDTH = 78


@contextlib.contextmanager
def reporting(job: Job, n_splits: int, *, every: float = 2.0) -> Iterator[None]:
    """While the block runs, say which stage it is in; only jobs of some seconds say anything."""
    stop = threading.Event()
    thread = threading.Thread(target=_report, args=(_Stage(job, n_splits), every, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Stage:
    """Where the job is, told from the files that its tasks leave."""

    def __init__(self, job: Job, n_splits: int) -> None:
        self.job, self.n_splits = job, n_splits
        self.rows: dict[Path, int] = {}

    def line(self, seconds: float) -> str:
        """What is done and at which rate."""
        folder = self.job.work_folder("splits")
        for path in set(folder.glob("[0-9]*.json")) - self.rows.keys():
            self.rows[path] = json.loads(path.read_text())["counts"].get("exposures", 0)
        rows = sum(self.rows.values())
        if len(self.rows) < self.n_splits:
            done = f"{len(self.rows)}/{self.n_splits} splits, {rows:,} rows"
            return f"reading: {done}, {rows / seconds / 1e6:.2f} M rows/s, {seconds:.0f} s"
        written = len(list(Path(self.job.folder).glob("[rs]*s/part-*.parquet")))
        if written:
            return f"writing: {written} files, {rows:,} rows read, {seconds:.0f} s"
        cut = len(list(self.job.work_folder("cut").glob("[0-9]*.json")))
        if cut < self.job.partitions:
            return f"cutting: {cut}/{self.job.partitions} partitions, {rows:,} rows read, {seconds:.0f} s"
        return f"numbering items: {rows:,} rows read, {seconds:.0f} s"


def _report(stage: _Stage, every: float, stop: threading.Event) -> None:
    begin, told = time.monotonic(), 0.0
    terminal = sys.stderr.isatty()
    while not stop.wait(every):
        seconds = time.monotonic() - begin
        if not terminal and seconds - told < 30:
            continue
        told = seconds
        line = stage.line(seconds)
        print(f"\r{line:<{WIDTH}}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    if terminal and told:
        print("\r" + " " * WIDTH + "\r", end="", file=sys.stderr, flush=True)
