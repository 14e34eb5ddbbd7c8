"""Pools of worker processes on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from etl.runtime.errors import InputError


def n_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def process_pool(n: int, hint: str) -> Iterator[ProcessPoolExecutor]:
    """A pool of `n` processes, which end with this one.

    Args:
        n: number of processes.
        hint: what to do if one is killed, for the error.

    Raises:
        InputError: a worker process was killed.
    """
    # Spawn: a process with Arrow threads must not be forked.
    pool = ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError(f"{n} worker processes until the job's end", "one that was killed", hint) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ignore Ctrl-C, and exit when the parent exits for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
