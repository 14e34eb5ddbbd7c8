"""Two workers without Ray: a run that is stopped and resumed is bit-identical to an undisturbed one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.runs import assert_same_run, options
from tests.support.workers import run_workers
from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.loop import train
from trainer.prepare import prepare
from trainer.run.signals import STOP, Stopped
from trainer.training.step import TrainStep

pytestmark = pytest.mark.cluster


def worker(rank: int, meet: Path, config: TrainerConfig, stop_at: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    take = TrainStep.step

    def step(self, parts, number):
        if number == stop_at:
            (Path(config.output) / STOP).touch()
        return take(self, parts, number)

    TrainStep.step = step
    try:
        train(config, World.from_process_group())
    except Stopped as stopped:
        meet.with_name("stopped").write_text(str(stopped))
    os._exit(0)


def run(fifty, folder: Path, *, stop_at: int = -1, meet: str = "meet") -> Path:
    config, _ = prepare([*options(fifty, folder / "run"), "train.max_grad_norm=0.5"])
    run_workers(worker, (folder / meet, config, stop_at), nprocs=2)
    return folder / "run"


def test_stopped_run_of_two_workers_resumes_bit_identical(fifty, tmp_path):
    for name in ("calm", "broken"):
        (tmp_path / name).mkdir()
    calm = run(fifty, tmp_path / "calm")
    broken = run(fifty, tmp_path / "broken", stop_at=4, meet="first")
    assert (tmp_path / "broken" / "stopped").read_text().startswith("stopped after step ")
    assert not (broken / "summary.json").exists()
    (broken / STOP).unlink()
    assert_same_run(calm, run(fifty, tmp_path / "broken", meet="second"))
