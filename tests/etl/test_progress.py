"""The progress line names the stage that the job's files show."""

from __future__ import annotations

from pathlib import Path

from etl.config import load
from etl.job import write_record
from etl.progress import _Stage
from etl.sessions import make_job


def test_each_stage_is_told_from_the_files_it_leaves(tmp_path):
    options = load(["input=a.csv", "output=out", "scenario=qb_video", "shards=4"])
    job = make_job(options, tmp_path, log_bytes=1)
    stage = _Stage(job, n_splits=2)
    assert stage.line(2.0).startswith("reading: 0/2 splits, 0 rows, 0.00 M rows/s")
    write_record(job.work("splits", 0, "json"), {"counts": {"exposures": 3_000_000}})
    assert stage.line(2.0) == "reading: 1/2 splits, 3,000,000 rows, 1.50 M rows/s, 2 s"
    write_record(job.work("splits", 1, "json"), {"counts": {}})
    assert stage.line(3.0).startswith("cutting: 0/1 partitions, 3,000,000 rows read")
    write_record(job.work("cut", 0, "json"), {})
    assert stage.line(3.0).startswith("numbering items: 3,000,000 rows")
    (tmp_path / "sessions").mkdir()
    Path(tmp_path / "sessions" / "part-00000.parquet").touch()
    assert stage.line(4.0) == "writing: 1 files, 3,000,000 rows read, 4 s"
