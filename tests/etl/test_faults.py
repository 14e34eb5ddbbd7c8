"""The complete job on mutated input, on a full disk and when killed: no wrong row, no partial dataset."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import etl.sessions
from etl.config import load
from etl.dataset import open_dataset
from etl.engines.java import OLDEST_JAVA, java_version
from etl.logs.tenrec import VIDEO
from tests.etl.test_parse import PIECES, slow_rows
from tests.support.engine import build
from tests.support.logs import generated_log
from tests.support.mounts import small_disk
from tests.support.reference import Options, sessionize
from tests.support.session_logs import HEADER, check

ROOT = Path(__file__).parents[2]
needs_java = pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer")


def mutated_log(seed: int) -> bytes:
    """Lines of a few users, mutated by insertion, deletion and overwriting; the last one may be truncated."""
    rng = np.random.default_rng(seed)
    lines = [
        f"{rng.integers(1, 6)},{rng.integers(1, 40)},{int(rng.random() < 0.7)},0,{rng.integers(2)},0,"
        f"c{rng.integers(4)},{rng.integers(5)},1,\\N\n".encode()
        for _ in range(200)
    ]
    data = bytearray(b"".join(lines))
    for _ in range(int(rng.integers(1, 12))):
        at = int(rng.integers(0, len(data)))
        piece = PIECES[rng.integers(len(PIECES))]
        end = (at, at + int(rng.integers(1, 30)), at + len(piece))[rng.integers(3)]
        data[at:end] = piece
    return bytes(data if rng.random() < 0.5 else data[:-3])


def as_csv(rows: list[tuple]) -> str:
    """Rows accepted by the slow reader, as plain CSV for the reference sessionizer."""
    names = ["user_id", "item_id", "click", "follow", "like", "share", "watching_times", "gender", "age", "category"]
    lines = [HEADER]
    for row in rows:
        value = dict(zip(names, row, strict=True))
        value["video_category"] = value.pop("category")
        quoted = {n: "\\N" if value[n] is None else str(value[n]) for n in VIDEO}
        quoted["video_category"] = '"' + quoted["video_category"].replace('"', '""') + '"'
        lines.append(",".join(quoted[n] for n in VIDEO))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("engine", "seeds"), [("local", range(5, 50)), pytest.param("spark", range(5), marks=pytest.mark.spark)]
)
def test_job_on_fifty_mutated_logs_equals_the_reference(request, tmp_path, engine, seeds):
    if engine == "spark":
        request.getfixturevalue("spark")
    for seed in seeds:
        data = mutated_log(seed)
        log, out = tmp_path / f"{seed}.csv", tmp_path / f"out-{seed}"
        bom, newline = (b"\xef\xbb\xbf" if seed % 3 == 0 else b""), (b"\r\n" if seed % 5 == 0 else b"\n")
        log.write_bytes(bom + HEADER.encode() + newline + data)
        options = ["scenario=qb_video", "shards=3", "protocol.min_clicks=5", "protocol.max_clicks=12"]
        etl.sessions.build(load([f"input={log}", f"output={out}", f"engine={engine}", *options]))
        text = as_csv(slow_rows(data))
        check(open_dataset(out), sessionize([text], Options(min_clicks=5, max_clicks=12)))


def run(*options: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "etl", *options]
    return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for(process: subprocess.Popen, work: Path, pattern: str) -> list[psutil.Process]:
    """Wait for a file, suspend the driver and its descendants, and return them, the driver first."""
    deadline = time.monotonic() + 240
    while not list(work.glob(pattern)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    driver = psutil.Process(process.pid)
    driver.suspend()  # first, so that nothing starts between listing and suspending the others
    held = [driver, *driver.children(recursive=True)]
    for member in held[1:]:
        member.suspend()
    return held


@pytest.mark.spark
@needs_java
def test_killed_driver_keeps_the_old_output_and_a_rerun_completes(tmp_path):
    """While all processes are suspended the disk holds what a kill would leave, so one driver shows three kills."""
    log = generated_log(tmp_path / "log.csv", users=300, items=90, seed=6)
    options = [f"input={log}", "scenario=qb_video", "shards=4", "overwrite=true"]
    out, work = tmp_path / "out", tmp_path / ".out.building"
    old = build([*options, f"output={out}", "protocol.max_clicks=20"]).manifest.fingerprint
    snapshots = []
    for patterns in (["_spark"], ["_work/splits/*.json", "_work/cut/*.json", "sessions/part-*"]):
        process = run(*options, f"output={out}", "engine=spark")
        for pattern in patterns:
            held = wait_for(process, work, pattern)
            assert open_dataset(out).manifest.fingerprint == old, pattern
            snapshots.append(tmp_path / f"killed-{len(snapshots)}")
            for folder in (out, work):
                shutil.copytree(folder, snapshots[-1] / folder.name)
            if pattern != patterns[-1]:
                for member in held[::-1]:
                    member.resume()
        for member in held:
            member.kill()
        process.wait(20)
        assert open_dataset(out).manifest.fingerprint == old
    process = run(*options, f"output={out}")
    assert process.wait(120) == 0, process.stderr.read()
    new = open_dataset(out).manifest
    assert new.fingerprint != old
    assert not work.exists()
    for snapshot in snapshots:
        again = build([*options, f"output={snapshot / 'out'}"], partitions=1).manifest
        assert (again.fingerprint, again.files) == (new.fingerprint, new.files), snapshot
        assert [path.name for path in snapshot.iterdir()] == ["out"], snapshot


@pytest.mark.parametrize("engine", ["local", pytest.param("spark", marks=[pytest.mark.spark, needs_java])])
def test_full_disk_is_a_one_line_error_and_leaves_no_output(tmp_path, engine):
    with small_disk(tmp_path / "disk", "1m") as disk:
        log = generated_log(tmp_path / "log.csv", users=3000, items=500, seed=7)
        options = ["scenario=qb_video", "shards=4", f"engine={engine}"]
        process = run(f"input={log}", f"output={disk / 'out'}", *options)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 2, errors
        assert "Traceback" not in errors
        assert errors.splitlines()[-1].startswith("error: expected room on the disk")
        assert not (disk / "out").exists()
        assert not list(disk.glob(".out.building*"))
