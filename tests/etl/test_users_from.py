"""`users_from`: keep only rows of the users of another log, for sessions of several logs in sequence."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from etl.__main__ import main
from etl.dataset import open_dataset

VIDEO = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age\n"
ARTICLE = "user_id,item_id,click,gender,age,like\n"


@pytest.fixture
def logs(tmp_path):
    """Five users with four video clicks each; two of them and an unknown user have article clicks."""
    video = [f"{user},{item},1,0,0,0,\\N,1,0,0\n" for item in range(1, 5) for user in range(1, 6)]
    (tmp_path / "video.csv").write_text(VIDEO + "".join(video))
    article = ["2.0,901,1.0,1,3,0\n", "4.0,902,1.0,1,3,1\n", "2.0,903,1.0,1,3,0\n", "9.0,903,1.0,1,3,0\n"]
    (tmp_path / "article.csv").write_text(ARTICLE + "".join(article))
    return tmp_path


def build(logs, output, *more):
    options = [f"output={logs / output}", "scenario=qk_video", "protocol.min_clicks=3", *more]
    status = main([f"input=[{logs}/video.csv,{logs}/article.csv]", *options])
    return status, logs / output


def sessions(path):
    dataset = open_dataset(path)
    raw = dict(zip(*(dataset.items()[name].to_pylist() for name in ("item", "item_id")), strict=True))
    tables = [pq.read_table(dataset.file(entry.path)) for entry in dataset.session_files]
    rows = [row for table in tables for row in table.select(["user_id", "items"]).to_pylist()]
    return {row["user_id"]: [raw[item] for item in row["items"]] for row in rows}


@pytest.mark.parametrize("more", [[], ["protocol.min_item_clicks=2"], ["split_bytes=64"]])
def test_sessions_take_history_from_one_log_and_targets_from_another(logs, more):
    status, path = build(logs, "data", f"users_from={logs}/article.csv", *more)
    assert status == 0
    few = "protocol.min_item_clicks=2" in more  # only 903 has two clicks: of user 2 and of the unknown user
    assert sessions(path) == {2: [1, 2, 3, 4, *([] if few else [901]), 903], 4: [1, 2, 3, 4, *([] if few else [902])]}
    statistics = json.loads((path / "statistics.json").read_text())
    assert statistics["rows_of_other_users"] == 3 * 4
    assert statistics["rows_read"] == 24
    assert statistics["raw"]["users"] == 3


def test_fingerprint_depends_on_the_set_of_users(logs):
    (logs / "others.csv").write_text(ARTICLE + "2,901,1,1,3,0\n4,902,0,1,3,1\n9,1,0,1,1,1\n")
    (logs / "fewer.csv").write_text(ARTICLE + "2,901,1,1,3,0\n9,1,0,1,1,1\n")
    manifests = {}
    for name, more in {
        "all": [],
        "article": [f"users_from={logs}/article.csv"],
        "others": [f"users_from=[{logs}/others.csv]"],
        "fewer": [f"users_from={logs}/fewer.csv"],
    }.items():
        status, path = build(logs, name, *more)
        assert status == 0
        manifests[name] = json.loads((path / "manifest.json").read_text())
    assert "users_from" not in manifests["all"]["protocol"]
    assert manifests["article"]["fingerprint"] == manifests["others"]["fingerprint"]  # the same users
    assert len({manifest["fingerprint"] for manifest in manifests.values()}) == 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{}/absent.csv", "absent.csv"),
        ("[]", "users_from=FILE"),
        ("{}/strangers.csv", "24 are of users that users_from lacks"),
    ],
)
def test_invalid_users_from_is_reported_and_writes_nothing(logs, capsys, value, expected):
    (logs / "strangers.csv").write_text(ARTICLE + "77,901,1,1,3,0\n")
    status, path = build(logs, "data", f"users_from={value.format(logs)}")
    err = capsys.readouterr().err
    assert status == 2
    assert err.count("error: ") == 1
    assert expected in err
    assert not path.exists()
