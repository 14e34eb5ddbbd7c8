"""How the frozen tiny data set, bundle and result were made: `python -m tests.data.make_tiny`.

Twelve users click five times each among six items. Query vectors are (1, 0) for odd users and (0, 1)
for even ones; item i has the vector in `VECTORS`. The result's figures are worked out by hand
below; this script never runs a program to get one.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.bundle import (
    FEEDBACK_SCHEMA,
    finish_bundle,
    items_schema,
    lists_array,
    queries_schema,
    vectors_array,
)
from tests.data import TINY
from tests.support.engine import build, write_log

CLICKS = {
    1: "ABCDE",
    2: "ABCDF",
    3: "ABCEA",
    4: "BCDAB",
    5: "BCDBC",
    6: "CDEFD",
    7: "ABDCF",
    8: "ABECA",
    9: "ACDBE",
    10: "ABACB",
    11: "BACAD",
    12: "CBADC",
}
VECTORS = np.array([[5, 0], [4, 1], [3, 2], [3, 3], [1, 4], [0, 5]], np.float32)
"""Items 1..6; for queries (1, 0) items 3 and 4 tie."""
LIKED, SHOWN = "AB", "F"


def gain(rank: int) -> float:
    return 1 / math.log2(rank + 1)


# Scores of (0, 1) rank items 6 5 4 3 2 1 from 1 to 6; of (1, 0) items 1 2 at 1 2, items 3 and 4 tie at
# 4 (each has the other next to it), items 5 6 at 5 6. So the test targets of users 2 4 6 8 10 12
# (6 2 4 1 2 3) rank 1 5 3 6 5 4, those of users 1 3 5 7 9 11 (5 1 3 6 5 4) rank 5 1 4 6 5 4.
# Train clicks are 10 10 9 5 2 0: popularity ranks items 1..6 at 2 2 3 4 5 6 (1 and 2 tie), so the
# targets rank 6 2 4 2 2 3 and 5 2 3 6 5 4.
# Like scores rise with the user id. Each user has two rows of equal score; positives are one row each of
# users 3 4 8 10, over which 4 + ½, 5 + ½, 12 + ½, 15 + ½ of the 20 negatives score lower. Among clicked
# rows it is 2, 2, 5, 6 of 8. Inside these four users positive and negative tie: ½.
# mask_seen: 7 targets are repeats and miss; of users 1 2 7 9 11 the targets rank 1 1 2 1 1.
RESULT = {
    "test": {
        "hr@1": 2 / 12,
        "hr@2": 2 / 12,
        "hr@5": 10 / 12,
        "ndcg@1": 2 / 12,
        "ndcg@2": 2 / 12,
        "ndcg@5": (2 + gain(3) + 3 * gain(4) + 4 * gain(5)) / 12,
        "mrr@1": 2 / 12,
        "mrr@2": 2 / 12,
        "mrr@5": (2 + 1 / 3 + 3 / 4 + 4 / 5) / 12,
        "coverage@1": 2 / 6,
        "coverage@2": 4 / 6,
        "coverage@5": 1.0,
        "queries": 12,
        "repeat_share": 7 / 12,
        "auc/like": (4.5 + 5.5 + 12.5 + 15.5) / (4 * 20),
        "auc/like_given_click": (2 + 2 + 5 + 6) / (4 * 8),
        "gauc/like": 0.5,
        "rows/like": 24,
        "positives/like": 4,
    },
    "baselines": {
        "popularity": {
            "test": {
                "hr@1": 0.0,
                "hr@2": 4 / 12,
                "hr@5": 10 / 12,
                "ndcg@2": 4 * gain(2) / 12,
                "mrr@5": (4 / 2 + 2 / 3 + 2 / 4 + 2 / 5) / 12,
                "coverage@1": 1 / 6,
                "coverage@5": 5 / 6,
            }
        }
    },
    "mask_seen": {
        "test": {
            "hr@1": 4 / 12,
            "hr@2": 5 / 12,
            "hr@5": 5 / 12,
            "ndcg@5": (4 + gain(2)) / 12,
            "mrr@5": (4 + 1 / 2) / 12,
        }
    },
}


def main() -> None:
    shutil.rmtree(TINY, ignore_errors=True)
    TINY.mkdir(parents=True)
    rows = []
    for user, clicks in CLICKS.items():
        for letter in clicks:
            item = 101 + "ABCDEF".index(letter)
            rows.append((user, item, 1, 0, int(letter in LIKED), 0, "odd" if item % 2 else "even", 1, user % 2, 3))
            rows.append((user, 101 + "ABCDEF".index(SHOWN), 0, 0, 0, 0, "even", 0, user % 2, 3))
    log = write_log(TINY / "log.csv", rows)
    dataset = build(
        [f"input={log}", f"output={TINY / 'data'}", "scenario=qb_video", "shards=2", "protocol.min_clicks=5"]
    )
    write_bundle(dataset)
    (TINY / "result").mkdir()
    (TINY / "result" / "metrics.json").write_text(json.dumps(RESULT, indent=1) + "\n")


def write_bundle(dataset) -> None:
    folder = TINY / "bundle"
    folder.mkdir()
    items = pa.array(np.arange(1, 7, dtype=np.int32))
    pq.write_table(pa.table([items, vectors_array(VECTORS)], schema=items_schema(2)), folder / "items.parquet")
    sessions = [r for f in dataset.session_files for r in pq.read_table(dataset.file(f.path)).to_pylist()]
    for split, held_out in (("valid", 2), ("test", 1), ("next", 0)):
        seen = [s["items"][: 5 - held_out] for s in sessions]
        columns = [
            pa.array([s["user_id"] for s in sessions], pa.int64()),
            pa.array([s["items"][5 - held_out] if held_out else 0 for s in sessions], pa.int32()),
            lists_array(np.cumsum([0, *map(len, seen)]), np.array([i for s in seen for i in s], np.int32)),
            pa.array([s["n_clicks"] for s in sessions], pa.int32()),
            vectors_array(np.array([[s["user_id"] % 2, 1 - s["user_id"] % 2] for s in sessions], np.float32)),
        ]
        write_part(folder / f"queries-{split}", pa.table(columns, schema=queries_schema(2)))
    for split, block in (("valid", 3), ("test", 4)):
        rows = [
            {
                "task": "like",
                "user_id": s["user_id"],
                "item": item,
                "clicked": bool(bits & 128),
                "label": bits & 1,
                "score": s["user_id"] / 16,
            }
            for s in sessions
            for item, position, bits in zip(
                s["exposure_items"], s["exposure_position"], s["exposure_feedback"], strict=True
            )
            if position == block
        ]
        write_part(folder / f"feedback-{split}", pa.Table.from_pylist(rows, schema=FEEDBACK_SCHEMA))
    finish_bundle(folder, dataset=dataset.manifest.fingerprint, refit=False, n_items=6, dimension=2, model="tiny")


def write_part(folder: Path, table: pa.Table) -> None:
    folder.mkdir()
    pq.write_table(table, folder / "part-00000.parquet")


if __name__ == "__main__":
    main()
    print(json.dumps(sorted(p.relative_to(TINY).as_posix() for p in TINY.rglob("*") if p.is_file()), indent=1))
