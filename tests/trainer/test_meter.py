"""The displayed rate of a run is that of the last minute; the log has the mean of the epoch."""

from __future__ import annotations

import json
import threading

import pytest

from trainer.run import metrics_log
from trainer.run.metrics_log import Meter
from trainer.run.progress import Progress


def test_displayed_rate_is_that_of_the_last_minute(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics_log.time, "perf_counter", lambda: clock[0])
    progress = Progress(loss_sums=[0.0], loss_counts=[500.0])
    meter = Meter("clicks", 100_000, 1, done=500)
    shown = {}
    for second in range(1, 241):  # ten clicks a second for two minutes, then thirty
        clock[0] += 1
        progress.loss_counts = [progress.loss_counts[0] + (10 if second <= 120 else 30)]
        shown[second] = meter.values(progress, 0.0)
    assert shown[1]["recent_rate"] == pytest.approx(10)
    assert shown[120]["recent_rate"] == pytest.approx(10)
    assert shown[240]["recent_rate"] == pytest.approx(30)
    assert shown[240]["rate"] == pytest.approx(20)
    assert 10 < shown[150]["recent_rate"] < 30
    assert "30 clicks/s" in metrics_log.epoch_line(shown[240])


def test_progress_file_of_another_version_is_ignored(tmp_path, capfd):
    (tmp_path / metrics_log.PROGRESS).write_text(json.dumps({"epoch": 1, "epochs": 2, "rate": 3.0}))
    stop = threading.Event()
    stop.set()
    metrics_log._show(tmp_path, stop)
    assert capfd.readouterr() == ("", "")
