"""The summary of a pipeline's steps."""

from __future__ import annotations

import json

from cluster.steps import time_by_step


def test_time_of_each_step_is_shown_with_its_share_of_the_total(tmp_path):
    for name, seconds in (("sessions", 6.0), ("train-gru4rec", 234.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"done": True, "seconds": seconds}))
    message = time_by_step(["sessions", "train gru4rec", "evaluate gru4rec"], tmp_path)
    assert message == "time: sessions 6 s (2 %), train gru4rec 4 min (98 %), evaluate gru4rec 0 s (0 %)"
