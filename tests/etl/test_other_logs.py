"""KuaiRand on hand-made rows, overlaps of logs counted by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest

from etl.kuairand import main as kuairand
from etl.logs.kuairand import convert
from etl.logs.tenrec import NULL
from etl.overlap import main as overlap
from etl.runtime.errors import InputError
from tests.support.engine import build, write_log

LOG = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,tab"


@pytest.fixture
def download(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "log_random.csv").write_text(f"{LOG}\n2,30,1,1,15,0,0,0,0,0,0,0,1\n1,10,1,1,25,1,0,1,0,0,0,1,1\n")
    (folder / "log_standard.csv").write_text(
        f"{LOG}\n1,20,1,1,20,1,1,0,0,1,0,0,1\n1,10,1,1,10,0,0,0,1,0,0,0,1\n2,20,1,1,15,1,0,0,0,0,0,1,1\n"
    )
    (folder / "video_features_basic.csv").write_text('video_id,author_id,tag\n10,1,"12,68"\n20,2,\n')
    return folder


def test_kuairand_rows_are_in_time_order_with_their_outcomes(download, tmp_path):
    assert kuairand([f"input={download}", f"output={tmp_path / 'out.csv'}"]) == 0
    assert (tmp_path / "out.csv").read_text().splitlines() == [
        "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age",
        r"1,10,0,0,0,0,12,0,\N,\N",
        r"1,20,1,0,1,1,\N,0,\N,\N",
        r"1,10,1,1,0,0,12,1,\N,\N",
        r"2,30,0,0,0,0,\N,0,\N,\N",
        r"2,20,1,0,0,0,\N,1,\N,\N",
    ]
    options = [
        f"input={tmp_path / 'out.csv'}",
        f"output={tmp_path / 'ds'}",
        "scenario=qb_video",
        "protocol.min_clicks=3",
    ]
    with pytest.raises(InputError, match="2 users of 5 rows, who have 2 clicks at most"):  # all rows are read
        build(options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: [p.unlink() for p in d.glob("log_*")],
        lambda d: (d / "video_features_basic.csv").unlink(),
        lambda d: (d / "log_random.csv").write_text("user_id,video_id\n1,2\n"),
        lambda d: (d / "log_random.csv").write_text(f"{LOG}\n2,30,1,1,15,7,0,0,0,0,0,0,1\n"),
        lambda d: (d / "log_random.csv").write_text(f"{LOG}\n2,x,1,1,15,0,0,0,0,0,0,0,1\n"),
        lambda d: (d / "log_random.csv").write_text(f"{LOG}\n2,,1,1,15,0,0,0,0,0,0,0,1\n"),
    ],
)
def test_broken_download_fails_with_a_one_line_error(download, tmp_path, damage, capfd):
    damage(download)
    assert kuairand([f"input={download}", f"output={tmp_path / 'out.csv'}"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data"}  # no temporary files


@pytest.mark.parametrize("bucket_rows", [1, 7, 10_000])
def test_kuairand_order_does_not_depend_on_the_bucket_size(tmp_path, bucket_rows):
    random = np.random.default_rng(0)
    rows = random.integers(0, [9, 50, 20, 2, 2, 2, 2, 2], (3, 400, 8))
    header = "user_id,video_id,time_ms,is_click,is_follow,is_like,is_forward,long_view"
    for name, part in zip("abc", rows, strict=True):
        np.savetxt(tmp_path / f"log_{name}.csv", part, "%d", ",", header=header, comments="")
    tags = {video: str(video % 4) if video % 3 else "" for video in range(40)}
    lines = ["video_id,tag", *(f'{video},"{tag},9"' if tag else f"{video}," for video, tag in tags.items())]
    (tmp_path / "video_features_basic.csv").write_text("\n".join(lines) + "\n")
    stream = io.BytesIO()
    assert convert(tmp_path, stream, tmp_path, bucket_rows) == 1200
    expected = [
        f"{user},{video},{click},{follow},{like},{share},{tags.get(video) or NULL},{long},{NULL},{NULL}"
        for user, video, _, click, follow, like, share, long in sorted(
            rows.reshape(-1, 8).tolist(), key=lambda row: (row[0], row[2])
        )
    ]
    assert stream.getvalue().decode().splitlines()[1:] == expected


def row(user, item):
    return (user, item, 1, 0, 0, 0, "c", 1, 1, 1)


def test_overlap_counts_distinct_users_and_items(tmp_path, capsys):
    a = write_log(tmp_path / "a.csv", [row(1, 5), row(1, 6), row(2, 5), row(3, 7)])
    b = write_log(tmp_path / "b.csv", [row(2, 7), row(2, 7), row(3, 8), row(9, 5)])
    assert overlap([f"inputs=[{a},{b}]"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{a}: 3 users, 3 items",
        f"{b}: 3 users, 3 items",
        f"{a} ∩ {b}: 2 users, 2 items",
    ]


def test_overlap_distinguishes_large_ids_and_counts_rows_without_an_id(tmp_path, capsys):
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    large = 2**53
    lines = ["user_id,item_id,click", *(f"{large + n},1,1" for n in range(3)), ",2,1", "7.0, 3,1", "x,4,1", "7,3,1,9"]
    a.write_text("\r".join(lines) + "\r")
    b.write_text(f"item_id,user_id,click\n1,{large},1\n3,7,1\n")
    assert overlap([f"inputs=[{a},{b}]"]) == 0
    first, _, shared = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{a}: 4 users, 2 items; 1 rows left out: user_id is not set")
    assert first.count("; 1 rows left out: ") == 3
    assert shared == f"{a} ∩ {b}: 2 users, 2 items"


@pytest.mark.parametrize("inputs", ["inputs=[]", "inputs=a.csv", "inputs=[/no/a.csv,/no/b.csv]"])
def test_overlap_refuses_invalid_inputs(inputs, capfd):
    assert overlap([inputs]) == 2
    assert capfd.readouterr().err.startswith("error: expected ")
