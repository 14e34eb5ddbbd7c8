"""Prefetching of batches in a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Generic

from trainer.data.reader import T


class Prefetch(Generic[T]):
    """Runs an iterator a few elements ahead in a thread; `waited` is the time the consumer was blocked."""

    def __init__(self, source: Iterator[T], ahead: int = 4) -> None:
        self.source, self.waited = source, 0.0
        self.queue: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._fill, daemon=True)

    def _fill(self) -> None:
        try:
            for element in self.source:
                if not self._put(("element", element)):
                    return
            self._put(("end", None))
        except BaseException as error:  # re-raised in the consumer
            self._put(("error", error))

    def _put(self, entry: tuple[str, Any]) -> bool:
        while not self.stop.is_set():
            try:
                self.queue.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        self.thread.start()
        try:
            while True:
                begin = time.perf_counter()
                kind, value = self.queue.get()
                self.waited += time.perf_counter() - begin
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
        finally:
            self.stop.set()
            self.thread.join()
