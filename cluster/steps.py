"""Runs a step of a pipeline as a process, and skips it if its output is complete."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.child import dies_with_parent
from etl.runtime.errors import InputError
from etl.runtime.files import fingerprint_of, write_json
from etl.runtime.option_files import expand_files
from etl.runtime.output_path import hidden_sibling
from etl.runtime.progress import duration
from trainer.run.folder import CONFIG

SHARE = 0.02
"""Share of a core for sampling memory."""
MOVED_ASIDE = "replaced"
"""Hidden sibling of a training run while a new one takes its place."""


@dataclass(frozen=True)
class Step:
    """One step of a pipeline: a program run.

    Attributes:
        name: display name, also of the step's record.
        command: arguments after `python -m`.
        output: file or folder that the step creates.
        inputs: fingerprints of its inputs; with the command they decide whether it is up to date.
        is_complete: checks whether an output is complete.
        resumes: whether the program resumes an unfinished output, and never replaces one; others replace theirs.
    """

    name: str
    command: list[str]
    output: Path
    inputs: list[str]
    is_complete: Callable[[Path], bool]
    resumes: bool = False

    @property
    def key(self) -> str:
        """Cache key: everything that determines the output; of an `@FILE` the options in it."""
        return fingerprint_of([[*self.command[:1], *expand_files(self.command[1:])], self.inputs])


def run_step(step: Step, records: Path) -> None:
    """Run a step unless its output is complete and made from the same inputs and options.

    Raises:
        InputError: the program rejected its input (and printed why) or failed; the output is a file of others.
    """
    record = _record(records, step.name)
    before = _read(record)
    if before.get("key") == step.key and before.get("done") and step.is_complete(step.output):
        print(f"{step.name}: already done", flush=True)
        return
    if step.output.exists() and not before:
        expected = f"no {step.output.name} of others in {step.output.parent}"
        raise InputError(expected, step.output, "move it, or choose another folder for the pipeline")
    if step.resumes:
        _finish_replacement(step.output)
        if before.get("key") != step.key and step.output.exists():
            step.output.rename(hidden_sibling(step.output, MOVED_ASIDE))
    records.mkdir(parents=True, exist_ok=True)
    write_json(record, {"key": step.key, "command": step.command, "done": False})
    print(f"{step.name}: python -m {' '.join(step.command)}", flush=True)
    begin = time.monotonic()
    status, peak = _run([sys.executable, "-m", *step.command])
    seconds = time.monotonic() - begin
    if step.resumes and not _finish_replacement(step.output):
        write_json(record, before)  # of the output that was moved back
    if status:
        raise InputError(f"step {step.name} to succeed", f"exit status {status}", "fix the error above and run again")
    measured = {"seconds": round(seconds, 1), "peak_bytes": peak}
    write_json(record, {"key": step.key, "command": step.command, "done": True, **measured})
    print(f"{step.name}: {seconds:.0f} s, {peak / 2**30:.1f} GiB at most", flush=True)


def _finish_replacement(output: Path) -> bool:
    """Name an output that was moved aside `NAME.previous`, or move it back if there is no new one.

    Returns:
        Whether it was not moved back.

    Raises:
        InputError: `NAME.previous` exists and is not a training run.
    """
    moved, previous = hidden_sibling(output, MOVED_ASIDE), output.with_name(f"{output.name}.previous")
    if not moved.exists():
        return True
    if not output.exists():
        moved.rename(output)
        return False
    if previous.exists():
        if not (previous / CONFIG).is_file():
            raise InputError(f"a previous run in {previous}", "other files", "move them away")
        shutil.rmtree(previous)
    moved.rename(previous)
    return True


def time_by_step(names: list[str], records: Path) -> str:
    """Time of each step when it last ran, and its share of the total.

    Example: `time: sessions 1 s (2 %), train gru4rec 49 s (98 %)`.
    """
    seconds = {name: float(_read(_record(records, name)).get("seconds", 0.0)) for name in names}
    total = max(sum(seconds.values()), 1e-9)
    shares = [f"{name} {duration(value)} ({100 * value / total:.0f} %)" for name, value in seconds.items()]
    return f"time: {', '.join(shares)}"


def _record(records: Path, name: str) -> Path:
    return records / f"{name.replace(' ', '-')}.json"


def _read(record: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(record.read_text()))
    except (OSError, ValueError):
        return {}


def _run(command: list[str]) -> tuple[int, int]:
    """Run a command; returns its exit status, and the peak memory in bytes of all its processes together."""
    process = subprocess.Popen(dies_with_parent(command))
    watch = _PeakMemory(process.pid)
    watch.start()
    try:
        return process.wait(), watch.finish()
    except BaseException:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        process.kill()
        watch.finish()
        raise


class _PeakMemory(threading.Thread):
    """Samples the proportional memory (shared pages counted once) of a process and its descendants.

    The kernel walks all their pages, which takes a tenth of a second for a few GiB: the sampling interval is adapted to
    use `SHARE` of a core.
    """

    def __init__(self, pid: int, every: float = 0.5) -> None:
        super().__init__(daemon=True)
        self.process, self.every, self.peak, self.stop = psutil.Process(pid), every, 0, threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        cost = 0.0
        while not self.stop.wait(max(self.every, cost / SHARE)):
            begin, total = time.thread_time(), 0
            with suppress(psutil.Error):
                for process in [self.process, *self.process.children(recursive=True)]:
                    with suppress(psutil.Error):
                        memory = process.memory_full_info()
                        total += getattr(memory, "pss", memory.rss)
            self.peak, cost = max(self.peak, total), time.thread_time() - begin

    def finish(self) -> int:
        """Stop and return the peak in bytes."""
        self.stop.set()
        self.join()
        return self.peak


def file_fingerprint(path: Path) -> str:
    """Size and modification time of a local file or a folder's files; for anything else the name."""
    if not path.exists():
        return str(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return fingerprint_of([[str(f), os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in files])


def log_fingerprints(patterns: Iterable[str]) -> list[str]:
    """Size and modification time of the logs that paths, globs and URIs name.

    Raises:
        InputError: a glob that no file matches, or storage that cannot be read.
    """
    # Slow imports, not needed for --help.
    from etl.logs.splits import readable
    from etl.logs.tenrec import expand_input
    from etl.runtime.object_store import filesystem, is_remote

    result = []
    for name in (name for pattern in patterns for name in expand_input(pattern)):
        if is_remote(name):
            store, path = filesystem(name)
            with readable(name):
                info = store.get_file_info(path)
            result.append(fingerprint_of([name, info.size, info.mtime_ns]))
        else:
            result.append(file_fingerprint(Path(name)))
    return result
