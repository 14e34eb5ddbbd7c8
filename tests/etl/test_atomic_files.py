"""Atomic files and folders: either the old or the new content, and no leftovers after a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from etl.runtime.files import atomic_file, atomic_folder, write_json

WRITER = """
import sys, time
from pathlib import Path
from etl.runtime.files import atomic_file, atomic_folder
with {kind}(Path(sys.argv[1])) as new:
    (new / "a" if new.is_dir() else new).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("sync", [False, True])
def test_atomic_file_replaces_on_success_and_keeps_the_old_file_on_error(tmp_path, sync):
    path = tmp_path / "below" / "a.json"
    with atomic_file(path, sync=sync) as new:
        new.write_text("1")
        assert not path.exists()
    assert path.read_text() == "1"
    failed = atomic_file(path, sync=sync)
    failed.__enter__().write_text("2")
    assert not failed.__exit__(KeyError, KeyError(), None)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == "1"
    assert os.listdir(path.parent) == ["a.json"]


def test_concurrent_writers_of_one_file_use_separate_temporary_files(tmp_path):
    path = tmp_path / "a"
    with atomic_file(path) as first:
        first.write_text("first")
        with atomic_file(path) as second:
            assert second != first
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


@pytest.mark.parametrize("sync", [False, True])
def test_atomic_folder_replaces_on_success_and_keeps_the_old_one_on_error(tmp_path, sync):
    path = tmp_path / "below" / "a"
    with atomic_folder(path, sync=sync) as new:
        (new / "old").write_text("1")
    failed = atomic_folder(path, sync=sync)
    (failed.__enter__() / "new").write_text("2")
    assert not failed.__exit__(KeyError, KeyError(), None)
    assert os.listdir(path) == ["old"]
    with atomic_folder(path, sync=sync) as new:
        (new / "new").write_text("2")
    assert os.listdir(path) == ["new"]
    assert os.listdir(path.parent) == ["a"]


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_killed_writer_leaves_no_partial_output(tmp_path, kind):
    path = tmp_path / "a"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER.format(kind=kind), str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
    assert not path.exists()
    if kind == "atomic_folder":
        with atomic_folder(path) as new:
            assert os.listdir(new) == []
        assert os.listdir(tmp_path) == ["a"]
