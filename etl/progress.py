"""A line that says how far a long job is."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from etl.job import Job


@contextlib.contextmanager
def reporting(job: Job, n_splits: int, *, every: float = 2.0) -> Iterator[None]:
    """While the block runs, say how many splits are read; only jobs of some seconds say anything."""
    stop = threading.Event()
    thread = threading.Thread(target=_report, args=(job, n_splits, every, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _report(job: Job, n_splits: int, every: float, stop: threading.Event) -> None:
    begin, told = time.monotonic(), 0.0
    terminal = sys.stderr.isatty()
    folder = job.work_folder("splits")
    while not stop.wait(every):
        seconds = time.monotonic() - begin
        if not terminal and seconds - told < 30:
            continue
        told = seconds
        read = len(list(folder.glob("[0-9]*.json")))
        cut = len(list(job.work_folder("cut").glob("[0-9]*.json")))
        line = (
            f"reading: {read}/{n_splits} splits, {seconds:.0f} s"
            if read < n_splits
            else (f"cutting: {cut} partitions, {seconds:.0f} s")
        )
        print(f"\r{line:<60}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    if terminal and told:
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
