"""The progress line of long jobs."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 100
TERMINAL_SECONDS, LOG_SECONDS = 0.5, 30.0
"""Minimum seconds between two lines: on a terminal, where each replaces the last, and in a log."""


def progress_line(
    what: str, done: float = 0, total: float | None = None, unit: str = "", rate: float = 0.0, note: str = ""
) -> str:
    """Format progress: done, total, rate, and time left; a rate of 0 is unknown and left out.

    >>> progress_line("reading", 640, 1280, "MB", rate=40.2)
    'reading: 640/1,280 MB, 40 MB/s, 16 s left'
    >>> progress_line("epoch 1/3", 2500, 100000, "clicks", rate=0.4, note="loss 6.120")
    'epoch 1/3: 2,500/100,000 clicks, 0.40 clicks/s, 67.7 h left, loss 6.120'
    >>> progress_line("starting Spark"), progress_line("writing", 3, unit="files")
    ('starting Spark', 'writing: 3 files')
    """
    fields = [f"{done:,.0f}/{total:,.0f} {unit}" if total else f"{done:,.0f} {unit}" if unit else ""]
    if rate > 0:
        fields.append(f"{rate:,.{0 if rate >= 10 else 2}f} {unit}/s")
        if total:
            fields.append(f"{duration(max(total - done, 0) / rate)} left")
    details = ", ".join(filter(None, [*fields, note]))
    return f"{what}: {details}" if details else what


def duration(seconds: float) -> str:
    """Format a duration in seconds, from two minutes on in minutes, from two hours on in hours.

    >>> duration(119), duration(600), duration(9000)
    ('119 s', '10 min', '2.5 h')
    """
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


class ProgressLine:
    """Shows the progress of a job, rate-limited.

    Args:
        stream: standard error by default.
        every: minimum seconds between two lines in a log.
    """

    def __init__(self, stream: TextIO | None = None, *, every: float = LOG_SECONDS) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.every = TERMINAL_SECONDS if self.terminal else every
        self.shown = self.begin = time.monotonic()
        self.what, self.before, self.drawn = "", 0.0, False

    def update(self, what: str, done: float = 0, total: float | None = None, unit: str = "", note: str = "") -> None:
        """Show the progress if a line is due; the rate is since `what` was first shown."""
        now = time.monotonic()
        if what != self.what:
            self.what, self.begin, self.before = what, now, done
        rate = (done - self.before) / (now - self.begin) if done > self.before else 0.0
        self.show(progress_line(what, done, total, unit, rate, note))

    def show(self, line: str) -> None:
        """Show a line if one is due."""
        if time.monotonic() - self.shown >= self.every:
            self.shown = time.monotonic()
            self._print(f"\r{line:<{WIDTH}}" if self.terminal else f"{line}\n")
            self.drawn = self.terminal

    def say(self, line: str) -> None:
        """Print a permanent line."""
        self.close()
        self._print(f"{line}\n")

    def close(self) -> None:
        """Clear the line from the terminal."""
        if self.drawn:
            self._print(f"\r{'':<{WIDTH}}\r")
            self.drawn = False

    def _print(self, text: str) -> None:
        print(text, end="", file=self.stream, flush=True)
