"""The displayed rate of a run is that of the last minute; the log has the mean of the epoch."""

from __future__ import annotations

import json
import threading
from collections import defaultdict

import pytest

from etl.runtime.progress import progress_line
from tests.support.runs import options
from trainer.__main__ import main
from trainer.run import metrics_log, progress_file
from trainer.run.metrics_log import Meter
from trainer.run.progress import Progress
from trainer.run.progress_file import PROGRESS, ProgressFile, progress_bar


def test_displayed_rate_is_that_of_the_last_minute(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics_log.time, "perf_counter", lambda: clock[0])
    progress = Progress(loss_sums=[1000.0], loss_counts=[500.0])
    meter = Meter("clicks", 100_000, 3, done=500)
    shown = {}
    for second in range(1, 241):  # ten clicks a second for two minutes, then thirty
        clock[0] += 1
        progress.loss_counts = [progress.loss_counts[0] + (10 if second <= 120 else 30)]
        shown[second] = meter.shown(progress, waited=60.0)
    assert shown[1]["rate"] == pytest.approx(10)
    assert shown[120]["rate"] == pytest.approx(10)
    assert shown[240]["rate"] == pytest.approx(30)
    assert 10 < shown[150]["rate"] < 30
    assert meter.mean_rate(progress.loss_counts[0]) == pytest.approx(20)
    expected = "epoch 1/3: 5,300/100,000 clicks, 30 clicks/s, 53 min left, loss 0.189, waiting 25%"
    assert progress_line(**shown[240]) == expected


@pytest.mark.parametrize("text", ['{"epoch": 1, "epochs": 2, "rate": 3.0}', '{"what": "epo', "[]"])
def test_unreadable_progress_file_is_ignored(tmp_path, capfd, text):
    """Of another version, or incomplete."""
    (tmp_path / PROGRESS).write_text(text)
    stop = threading.Event()
    stop.set()
    progress_file._show(tmp_path, stop)
    assert capfd.readouterr() == ("", "")


def test_progress_of_a_killed_process_is_not_shown(tmp_path, capfd, monkeypatch):
    ProgressFile(tmp_path).write("epoch 2/2", 114_700, 20_862_829, "clicks", rate=14_018.0)
    monkeypatch.setattr("etl.runtime.progress.LOG_SECONDS", 0.0)
    with progress_bar(tmp_path):
        assert not (tmp_path / PROGRESS).exists()
    assert capfd.readouterr().err == ""


def test_every_phase_of_a_run_is_reported(fifty, tmp_path, monkeypatch):
    """Not only training: each validation and the bundle take long on a full log."""
    reports = defaultdict(list)
    write = ProgressFile.write

    def spy(self, what, done=0, total=None, unit="", **more):
        reports[what].append((done, total, unit))
        write(self, what, done, total, unit, **more)
        assert json.loads((tmp_path / "run" / PROGRESS).read_text()).keys() >= {"what", "done", "total", "unit"}

    monkeypatch.setattr(ProgressFile, "write", spy)
    settings = options(fifty, tmp_path / "run", "model=gru4rec", "train.epochs=2", "network.transitions=true")
    assert main([each for each in settings if "valid_sessions" not in each]) == 0
    assert {what.partition(" ")[0] for what in reports} >= {"preparing", "trying", "counting", "finding", "writing"}
    sessions = fifty.manifest.counts["sessions"]
    for what in ("epoch 1/2", "epoch 2/2", "validation", "scoring for the bundle"):
        done, total, unit = reports[what][-1]
        assert done == total > 0
        assert unit == ("clicks" if what.startswith("epoch") else "sessions")
    assert reports["validation"][-1][1] == reports["scoring for the bundle"][-1][1] == sessions
    assert not (tmp_path / "run" / PROGRESS).exists()
