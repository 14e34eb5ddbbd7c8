"""Transition diagnostics against counting in plain Python."""

from __future__ import annotations

import json
from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from etl import transitions
from etl.transitions import diagnose
from tests.support.engine import build, write_log


def slow(sessions: list[list[int]], every: int = 1) -> dict[str, float]:
    """Shares over one session in `every`."""
    follows: dict[int, set[int]] = {}
    for items in sessions:
        train = items[:-2]
        for source, target in pairwise(train):
            follows.setdefault(source, set()).add(target)
    out = {"from_last": 0, "from_last_three": 0, "from_any": 0, "repeats": 0}
    asked = sessions[::every]
    for *visible, target in asked:
        known = [target in follows.get(item, ()) for item in visible]
        out["from_last"] += known[-1]
        out["from_last_three"] += any(known[-3:])
        out["from_any"] += any(known)
        out["repeats"] += target in visible
    shares = {name: count / len(asked) for name, count in out.items()}
    return shares | {"branching": sum(map(len, follows.values())) / len(follows)}


def read(dataset) -> list[list[int]]:
    return [s for f in dataset.session_files for s in pq.read_table(dataset.file(f.path))["items"].to_pylist()]


def test_transition_shares_match_plain_counting(fifty):
    actual = diagnose([fifty.file(f.path) for f in fifty.session_files])
    sessions = read(fifty)
    assert actual["sessions"] == len(sessions)
    expected = slow(sessions)
    assert {name: actual[name] for name in expected} == pytest.approx(expected)
    assert actual["from_random"] <= actual["from_any"]
    assert json.loads(fifty.file("statistics.json").read_text())["transitions"] == actual


def test_sampled_sessions_are_compared_with_all_transitions(fifty, monkeypatch):
    monkeypatch.setattr(transitions, "SAMPLED_SESSIONS", len(read(fifty)) // 3)
    actual = diagnose([fifty.file(f.path) for f in fifty.session_files])
    expected = slow(read(fifty), every=4)  # 50 sessions, of which at most 16 are asked for
    assert actual["sessions"] == 13
    assert {name: actual[name] for name in expected} == pytest.approx(expected)


def test_sessions_on_a_ring_are_explained_by_the_last_click(tmp_path):
    """Every session walks the same ring: the last click determines the next one, a random earlier click does not."""
    rows = [[user, 1 + (user + step) % 40, 1, 0, 0, 0, 1, 1, 0, 0] for user in range(200) for step in range(12)]
    write_log(tmp_path / "log.csv", rows)
    dataset = build([f"input={tmp_path / 'log.csv'}", f"output={tmp_path / 'data'}", "scenario=qb_video"])
    actual = json.loads(dataset.file("statistics.json").read_text())["transitions"]
    assert actual["from_last"] == actual["from_any"] == actual["branching"] == 1.0
    assert actual["from_random"] == pytest.approx(1 / 11, abs=0.06)
    assert actual["repeats"] == 0.0
