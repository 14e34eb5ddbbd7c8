"""KuaiRand's logs in the `qb_video` format, sorted on disk; `etl/kuairand.py` has the mapping of columns.

The largest log has 322 million rows, so it is sorted on disk: a first pass counts each user's rows, a second appends
every row to the bucket file of its range of users, and each bucket is then sorted in memory and written.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from etl.logs.tenrec import NULL, VIDEO
from etl.runtime.errors import InputError
from etl.runtime.lookup import lookup

FLAGS = {
    "is_click": "click",
    "is_follow": "follow",
    "is_like": "like",
    "is_forward": "share",
    "long_view": "watching_times",
}
"""KuaiRand's outcome columns → Tenrec's."""

LOG_COLUMNS = ["user_id", "video_id", "time_ms", *FLAGS]

RECORD = np.dtype([("user", "<i8"), ("video", "<i8"), ("time", "<i8"), ("flags", "u1")])
"""A row in a bucket file; flag `n` of `FLAGS` is bit `n`."""

BUCKET_ROWS = 4_000_000
"""Maximum rows that are sorted in memory at once (more only if a single user has more)."""


def convert(folder: Path, stream: IO[bytes], work: Path, bucket_rows: int = BUCKET_ROWS) -> int:
    """Write all exposures of a KuaiRand folder as CSV, by user and time.

    Rows of one user with the same time retain the order of the files (sorted by name) and of their rows.

    Args:
        folder: folder of the download.
        stream: output stream of the CSV file.
        work: folder for temporary files, 25 bytes per row.
        bucket_rows: maximum rows that are sorted in memory at once.

    Returns:
        The number of rows.

    Raises:
        InputError: no logs, a missing column, or an outcome other than 0 or 1.
    """
    logs = sorted(folder.glob("log_*.csv"))
    if not logs:
        raise InputError("KuaiRand's log_*.csv", f"none in {folder}", "name the data folder of the download")
    tags = VideoTags.read(folder)
    with tempfile.TemporaryDirectory(prefix=".kuairand-", dir=work) as buckets:
        paths = _distribute(logs, _first_users(logs, bucket_rows), Path(buckets))
        stream.write((",".join(VIDEO) + "\n").encode())
        return sum(_write_bucket(path, tags, stream) for path in paths)


def _first_users(logs: list[Path], bucket_rows: int) -> np.ndarray:
    """The first user of each bucket but the first one, int64, ascending.

    With 2, 3, 1 rows of users 4, 5, 8 and `bucket_rows=4` the buckets are {4} and {5, 8}: `[5]`.
    """
    rows: Counter[int] = Counter()
    for log in logs:
        for batch in _batches(log, {"user_id": pa.int64()}):
            users, counts = np.unique(batch["user_id"].to_numpy(), return_counts=True)
            rows.update(dict(zip(users.tolist(), counts.tolist(), strict=True)))
    first, filled = [], 0
    for user in sorted(rows):
        if filled and filled + rows[user] > bucket_rows:
            first.append(user)
            filled = 0
        filled += rows[user]
    return np.array(first, np.int64)


def _distribute(logs: list[Path], first_users: np.ndarray, folder: Path) -> list[Path]:
    """Append every row to the file of its bucket, in the order of the logs."""
    paths = [folder / f"{bucket:05d}" for bucket in range(len(first_users) + 1)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for log in logs:
            for batch in _batches(log, dict.fromkeys(LOG_COLUMNS, pa.int64())):
                records = _records(batch, log)
                bucket = np.searchsorted(first_users, records["user"], side="right")
                order = np.argsort(bucket, kind="stable")
                ends = np.cumsum(np.bincount(bucket, minlength=len(files)))
                for file, rows in zip(files, np.split(order, ends[:-1]), strict=True):
                    records[rows].tofile(file)
    return paths


def _records(batch: pa.RecordBatch, log: Path) -> np.ndarray:
    """Convert a batch of a log to `RECORD`s."""
    if any(batch[name].null_count for name in LOG_COLUMNS[:3]):
        raise InputError("user_id, video_id and time_ms in every row", "an empty field", f"check {log}")
    records = np.empty(len(batch), RECORD)
    for field, column in zip(("user", "video", "time"), LOG_COLUMNS[:3], strict=True):
        records[field] = batch[column].to_numpy(zero_copy_only=False)
    records["flags"] = 0
    for bit, name in enumerate(FLAGS):
        flag = batch[name].to_numpy(zero_copy_only=False)
        if not np.isin(flag, (0, 1)).all():
            raise InputError(f"{name} of 0 or 1", "another value", f"check {log}")
        records["flags"] |= (flag << bit).astype(np.uint8)
    return records


def _write_bucket(path: Path, tags: VideoTags, stream: IO[bytes]) -> int:
    """Sort a bucket by user and time and write it as CSV without quotes."""
    records = np.fromfile(path, RECORD)
    path.unlink()
    records = records[np.lexsort((records["time"], records["user"]))]  # stable: equal times keep their order
    columns: dict[str, pa.Array] = {
        "user_id": pa.array(records["user"]),
        "item_id": pa.array(records["video"]),
        "video_category": tags.of(records["video"]),
    }
    for bit, name in enumerate(FLAGS.values()):
        columns[name] = pa.array(records["flags"] >> bit & 1)
    null = pa.array([NULL]).take(pa.array(np.zeros(len(records), np.int32)))
    table = pa.table([columns.get(name, null) for name in VIDEO], VIDEO)
    pa_csv.write_csv(table, stream, pa_csv.WriteOptions(include_header=False, quoting_style="none"))
    return len(records)


@dataclass(frozen=True)
class VideoTags:
    """The first tag of each video, 12 bytes per video.

    Attributes:
        video: int64, ascending.
        code: int32, parallel to `video`: position in `names`.
        names: strings; the first stands for null.
    """

    video: np.ndarray
    code: np.ndarray
    names: pa.Array

    @classmethod
    def read(cls, folder: Path) -> VideoTags:
        """Read `video_features_basic*.csv`.

        Raises:
            InputError: a missing file or column.
        """
        paths = sorted(folder.glob("video_features_basic*.csv"))
        if not paths:
            raise InputError(
                "KuaiRand's video_features_basic*.csv", f"none in {folder}", "name the data folder of the download"
            )
        code_of: dict[str | None, int] = {NULL: 0}
        # Sentinel entry, so that searches always have an entry to compare with.
        videos, codes = [np.array([np.iinfo(np.int64).min])], [np.zeros(1, np.int32)]
        for path in paths:
            for batch in _batches(path, {"video_id": pa.int64(), "tag": pa.string()}):
                # Several tags are in one quoted field: "12,68".
                first = pc.list_element(pc.split_pattern(pc.fill_null(batch["tag"], ""), ","), 0)
                tag = pc.dictionary_encode(pc.if_else(pc.equal(first, ""), NULL, first))
                code_of_tag = [code_of.setdefault(name, len(code_of)) for name in tag.dictionary.to_pylist()]
                videos.append(batch["video_id"].to_numpy(zero_copy_only=False))
                codes.append(np.array(code_of_tag, np.int32)[tag.indices.to_numpy(zero_copy_only=False)])
        video, code = np.concatenate(videos), np.concatenate(codes)
        order = np.argsort(video, kind="stable")
        return cls(video[order], code[order], pa.array(list(code_of)))

    def of(self, video: np.ndarray) -> pa.Array:
        r"""Tags of videos, `\N` without one."""
        index, match = lookup(self.video, video)
        return self.names.take(pa.array(np.where(match, self.code[index], 0)))


def _batches(path: Path, types: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """Stream columns of a CSV file."""
    convert_options = pa_csv.ConvertOptions(include_columns=list(types), column_types=types)
    try:
        with pa_csv.open_csv(path, pa_csv.ReadOptions(block_size=16 << 20), convert_options=convert_options) as reader:
            yield from reader
    except (pa.ArrowInvalid, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"columns {', '.join(types)} in {path}", reason, "check the download") from None
