"""`python -m tests.support.spark_jobs MASTER < jobs.json`: many runs of `python -m etl` in one process."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from etl.__main__ import main
from etl.config import SparkOptions
from etl.engines.spark import spark_session

if __name__ == "__main__":
    options = SparkOptions(master=sys.argv[1], executor_memory="512m")
    with tempfile.TemporaryDirectory() as scratch, spark_session(options, Path(scratch)):
        for job in json.load(sys.stdin):
            if status := main([*job, f'spark.master="{sys.argv[1]}"']):
                sys.exit(status)
