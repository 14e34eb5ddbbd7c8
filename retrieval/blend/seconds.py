"""Time spent by name, summed over threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter


class Seconds:
    """Seconds by name; several threads may add to them.

    Args:
        names: names that are reported even if no time is spent.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._spent, self._lock = dict.fromkeys(names, 0.0), threading.Lock()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that the block takes."""
        begin = perf_counter()
        yield
        seconds = perf_counter() - begin
        with self._lock:
            self._spent[name] += seconds

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        with self._lock:
            taken, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        return taken
