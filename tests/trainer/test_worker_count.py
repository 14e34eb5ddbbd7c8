"""`ray.workers=auto` chooses by the amount of work; an explicit number is used as given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.runs import options
from trainer.config import from_dict, load
from trainer.distributed.worker_count import choose_workers, worker_count
from trainer.distributed.world import World, set_threads

HERE, CLUSTER = False, True


@pytest.mark.parametrize(
    ("batch_targets", "clicks", "cores", "on_cluster_or_gpus", "workers"),
    [
        (256, 10**9, 2, HERE, 0),  # recipe=small: a step is too small to share
        (4095, 10**9, 2, HERE, 0),  # the second worker would have less than 2,048
        (4096, 10**9, 2, HERE, 2),
        (8192, 10**9, 2, HERE, 2),  # no more workers than cores
        (8192, 10**9, 64, HERE, 4),
        (8192, 10**9, 1, HERE, 0),
        (8192, 4_999_999, 64, HERE, 0),  # finished before Ray would have started
        (256, 1, 2, CLUSTER, [1, 1]),
        (8192, 1, 2, CLUSTER, [1, 4]),
    ],
)
def test_worker_count_follows_from_batch_size_clicks_and_cores(
    batch_targets, clicks, cores, on_cluster_or_gpus, workers
):
    assert worker_count(batch_targets, clicks, cores, on_cluster_or_gpus=on_cluster_or_gpus) == workers


def test_threads_and_workers_are_those_of_the_cores_that_this_process_may_use(fifty, tmp_path, monkeypatch):
    """On a machine with 64 cores, of which `taskset` leaves two."""
    for name in ("RAY_ADDRESS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 7})
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    set_threads(World.alone())
    set_threads(replace(World.alone(), size=2))
    assert threads == [2, 1]
    line = [o for o in options(fifty, tmp_path, "train.batch_tokens=16384") if not o.startswith("ray.")]
    config = load([*line, "train.epochs=1000000", "ray.workers=auto"])
    choose_workers(config, fifty)
    assert config.ray.workers == 2


@pytest.mark.parametrize(("requested", "taken"), [("auto", 0), ("1", 1), ("[1,2]", [1, 2])])
def test_auto_prints_its_choice_and_an_explicit_number_is_used(fifty, tmp_path, monkeypatch, capsys, requested, taken):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    line = [o for o in options(fifty, tmp_path) if not o.startswith("ray.")]
    config = load([*line, f"ray.workers={requested}"])
    choose_workers(config, fifty)
    assert config.ray.workers == taken
    assert from_dict(config.to_dict()).ray.workers == taken
    message = "ray.workers=auto: this process alone for 64 targets a step\n" if requested == "auto" else ""
    assert capsys.readouterr().out == message
