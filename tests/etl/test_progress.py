"""The progress line: its text and timing, and the job's stage derived from its files."""

from __future__ import annotations

import io
from pathlib import Path

import etl.runtime.progress
from etl.config import load
from etl.logs.splits import LogFile, Split
from etl.runtime.progress import ProgressLine
from etl.sessions import make_job
from etl.stages.job_progress import Stage
from etl.stages.task_files import write_record


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_stage_is_derived_from_the_files_written(tmp_path):
    options = load(["input=a.csv", "output=out", "scenario=qb_video"])
    job = make_job(options, tmp_path, log_bytes=1)
    log = LogFile("a.csv", 7_000_000, (), 0, 7_000_000)
    splits = [Split(0, log, 0, 4_000_000), Split(1, log, 4_000_000, 7_000_000)]
    stage = Stage(job, splits, "starting Spark")
    assert stage.report() == ("starting Spark", 0, None, "")
    stage.started()
    assert stage.report() == ("reading", 0, 7, "MB")
    write_record(job.work("splits", 0, "json"), {"counts": {"exposures": 3_000_000}})
    assert stage.report() == ("reading", 4, 7, "MB")
    write_record(job.work("splits", 1, "json"), {"counts": {}})
    assert stage.report() == ("cutting", 0, 1, "partitions")
    write_record(job.work("cut", 0, "json"), {})
    assert stage.report() == ("numbering items", 0, None, "")
    (tmp_path / "sessions").mkdir()
    Path(tmp_path / "sessions" / "part-00000.parquet").touch()
    assert stage.report() == ("writing", 1, None, "files")


def test_log_gets_a_line_every_30_seconds_and_terminal_one_updated_line(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(etl.runtime.progress.time, "monotonic", lambda: now[0])
    log, terminal = io.StringIO(), Terminal()
    lines = [ProgressLine(log), ProgressLine(terminal)]
    for second in range(1, 62):
        now[0] = 100.0 + second
        for line in lines:
            line.update("reading", second, 100, "MB")
    for line in lines:
        line.say("all read")
    assert log.getvalue().splitlines() == [
        "reading: 30/100 MB, 1.00 MB/s, 70 s left",
        "reading: 60/100 MB, 1.00 MB/s, 40 s left",
        "all read",
    ]
    drawn = terminal.getvalue().split("\r")
    assert drawn[1].strip() == "reading: 1/100 MB"  # no rate yet
    assert drawn[61].strip() == "reading: 61/100 MB, 1.00 MB/s, 39 s left"
    assert {len(line) for line in drawn[1:62]} == {etl.runtime.progress.WIDTH}  # each overwrites the previous one
    assert drawn[-1] == "all read\n"
    assert terminal.getvalue().count("\n") == 1
