"""Timeouts between workers: a worker that writes files is waited for, a worker lost within a step is not."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

import trainer.inference.export
import trainer.run.checkpoint
from tests.support.runs import options
from tests.support.workers import run_workers
from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.loop import train
from trainer.prepare import prepare
from trainer.training.step import TrainStep

pytestmark = pytest.mark.cluster
STEP_SECONDS = 3.0
SLOW_SECONDS = 2 * STEP_SECONDS


def after_a_pause(function, seconds: float):
    def slow(*arguments, **more):
        time.sleep(seconds)
        return function(*arguments, **more)

    return slow


def worker(rank: int, meet: Path, config: TrainerConfig, case: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=2, timeout=timedelta(seconds=STEP_SECONDS)
    )
    if case == "export" and rank == 0:
        trainer.inference.export._write_items = after_a_pause(trainer.inference.export._write_items, SLOW_SECONDS)
    if case == "share of the files" and rank == 1:
        trainer.inference.export._score_file = after_a_pause(trainer.inference.export._score_file, SLOW_SECONDS)
    if case == "checkpoint":
        trainer.run.checkpoint.write = after_a_pause(trainer.run.checkpoint.write, SLOW_SECONDS)
    if case == "step" and rank == 1:
        TrainStep.step = after_a_pause(TrainStep.step, 5 * STEP_SECONDS)
    begin = time.monotonic()
    try:
        train(config, World.from_process_group())
        outcome = "finished"
    except RuntimeError as error:
        outcome = str(error)
    meet.with_name(f"{case} {rank}").write_text(f"{time.monotonic() - begin} {outcome}")
    os._exit(0)  # the other worker may still sleep, and gloo's threads sometimes abort at interpreter exit


def outcome_of(fifty, folder: Path, case: str, *more: str) -> tuple[float, str]:
    """Seconds and outcome of worker 0 of two."""
    small = ["model=gru4rec", "train.epochs=1", "train.checkpoint_steps=20", *more]
    config, _ = prepare([*options(fifty, folder / "run"), *small])
    run_workers(worker, (folder / "meet", config, case), nprocs=2)
    seconds, _, outcome = (folder / f"{case} 0").read_text().partition(" ")
    return float(seconds), outcome


@pytest.mark.parametrize("case", ["export", "share of the files", "checkpoint"])
def test_worker_writing_longer_than_the_step_timeout_is_waited_for(fifty, tmp_path, case):
    seconds, outcome = outcome_of(fifty, tmp_path, case)
    assert outcome == "finished"
    assert seconds > SLOW_SECONDS
    assert (tmp_path / "run" / "summary.json").is_file()


def test_worker_lost_within_a_step_ends_the_others_by_timeout(fifty, tmp_path):
    seconds, outcome = outcome_of(fifty, tmp_path, "step")
    assert "timed out" in outcome.lower() or "timeout" in outcome.lower()
    assert seconds < 4 * STEP_SECONDS
