"""KuaiRand's logs as a table in the `qb_video` format; `etl/kuairand.py` says how their columns are read."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from etl.logs.tenrec import NULL, VIDEO
from etl.runtime.errors import InputError

LOG_COLUMNS = ["user_id", "video_id", "time_ms", "is_click", "is_like", "is_follow", "is_forward", "long_view"]
FLAGS = LOG_COLUMNS[3:]


def convert(folder: Path) -> pa.Table:
    """All exposures of a KuaiRand folder in Tenrec's columns, by user and time.

    Rows of one user with the same time keep the order of the files (sorted by name) and of their rows.

    Raises:
        InputError: no logs, a column missing, or an outcome that is not 0 or 1.
    """
    logs = sorted(folder.glob("log_*.csv"))
    if not logs:
        raise InputError("KuaiRand's log_*.csv", f"none in {folder}", "give the data folder of the download")
    shown = pa.concat_tables([_read(path, LOG_COLUMNS) for path in logs])
    for name in FLAGS:
        if len(shown) and not pc.all(pc.is_in(shown[name], pa.array([0, 1]))).as_py():
            raise InputError(f"{name} of 0 or 1", "another value", f"check the logs in {folder}")
    shown = shown.append_column("row", pa.array(range(len(shown)), pa.int64()))
    shown = shown.sort_by([("user_id", "ascending"), ("time_ms", "ascending"), ("row", "ascending")])
    columns = {
        "user_id": shown["user_id"],
        "item_id": shown["video_id"],
        "click": shown["is_click"],
        "follow": shown["is_follow"],
        "like": shown["is_like"],
        "share": shown["is_forward"],
        "video_category": _tags(folder, shown["video_id"]),
        "watching_times": shown["long_view"],
    }
    null = pa.array([NULL]).take(pa.array([0] * len(shown), pa.int32()))
    return pa.table([columns.get(name, null) for name in VIDEO], VIDEO)


def _read(path: Path, columns: list[str], types: dict[str, pa.DataType] | None = None) -> pa.Table:
    convert_options = pa_csv.ConvertOptions(
        include_columns=columns, column_types=types or dict.fromkeys(columns, pa.int64())
    )
    try:
        return pa_csv.read_csv(path, convert_options=convert_options)
    except (pa.ArrowInvalid, KeyError) as error:
        told = str(error).splitlines()[0]
        raise InputError(f"columns {', '.join(columns)} in {path}", told, "check the download") from None


def _tags(folder: Path, video: pa.ChunkedArray) -> pa.Array:
    """The first tag of each video, null without one."""
    found = sorted(folder.glob("video_features_basic*.csv"))
    if not found:
        raise InputError("KuaiRand's video_features_basic*.csv", f"none in {folder}", "give the whole data folder")
    types = {"video_id": pa.int64(), "tag": pa.string()}
    features = pa.concat_tables([_read(path, list(types), types) for path in found])
    place = pc.index_in(video, features["video_id"].combine_chunks())
    # Several tags stand in one quoted field: "12,68".
    tag = pc.list_element(pc.split_pattern(features["tag"].combine_chunks(), ","), 0)
    tag = pc.if_else(pc.equal(tag, ""), pa.scalar(None, pa.string()), tag)
    return pc.fill_null(tag.take(place.combine_chunks()), NULL)


def write(table: pa.Table, stream: IO[bytes]) -> None:
    """Write the table as CSV, no field in quotes."""
    stream.write((",".join(VIDEO) + "\n").encode())
    pa_csv.write_csv(table, stream, pa_csv.WriteOptions(include_header=False, quoting_style="none"))
