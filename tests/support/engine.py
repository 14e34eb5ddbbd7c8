"""Datasets for tests, built by the job in this process within milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import etl.engines.local
from etl import sessions
from etl.config import EtlConfig, load
from etl.dataset import Dataset, open_dataset


def build(options: Sequence[str] | EtlConfig, *, split_bytes: int | None = None, partitions: int = 2) -> Dataset:
    """Build a dataset from options of `python -m etl` or from a config (parsing options takes the longest)."""
    config = options if isinstance(options, EtlConfig) else load(options)
    config = dataclasses.replace(config, engine="local", processes=1, split_bytes=split_bytes or config.split_bytes)
    partial_users = etl.engines.local.partial_users
    with (
        mock.patch.object(sessions, "count_partitions", return_value=partitions),
        # The job must not rely on the order of partial users.
        mock.patch.object(etl.engines.local, "partial_users", lambda *a: iter(list(partial_users(*a))[::-1])),
        mock.patch("etl.logs.splits.BLOCK_BYTES", config.split_bytes),
    ):
        sessions.build(config)
    return open_dataset(config.output)


def write_log(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    """A `qb_video` log from rows in the order of its header."""
    header = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age"
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path
