"""Runs with item vectors initialised from co-occurrence: several workers, resumption, too little memory."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import trainer.task.sessions
from etl.dataset import open_dataset
from etl.runtime.errors import InputError
from tests.support.runs import assert_same_run, killed_at_step, options
from tests.support.workers import run_workers
from tests.trainer.test_step import free_port
from trainer.__main__ import main
from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.option_groups import ModelOptions, TrainOptions
from trainer.task.registry import model_task_of
from trainer.training import cooccurrence
from trainer.training.objective import INPUT, ITEM

START = "train.ppmi_start=0.5"


def no_memory(monkeypatch) -> None:
    monkeypatch.setattr(cooccurrence.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))


def begun(data: str, world: World) -> dict[str, torch.Tensor]:
    network = ModelOptions(embedding_dim=8, hidden_size=8, tie_embeddings=False)
    train = TrainOptions(ppmi_start=0.7)
    config = TrainerConfig(data=data, output="", model="gru4rec", tasks=["next"], network=network, train=train)
    model_task = model_task_of(config, open_dataset(data), world)
    train_step = model_task.train_step(1)
    model_task.init_from_counts(train_step, 2)
    return {name: train_step.tables[name].vector for name in (ITEM, INPUT)}


def worker(rank: int, size: int, port: int, data: str, folder: str) -> None:
    """Save a worker's initial vectors, and check its error with too little memory."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    world = World(rank, size, torch.device("cpu"))
    result = begun(data, world)
    with pytest.MonkeyPatch.context() as patch:
        no_memory(patch)
        with pytest.raises(InputError, match=r"free memory for train\.ppmi_start, got 0\.0 GiB"):
            begun(data, world)
    torch.save(result, f"{folder}/{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


@pytest.mark.cluster
def test_initial_vectors_of_several_workers_are_bit_identical_to_one(fifty, tmp_path):
    one = begun(str(fifty.path), World.alone())
    assert one[ITEM].norm(dim=1).median() == pytest.approx(0.7, abs=1e-5)
    for size in (2, 3):
        run_workers(worker, (size, free_port(), str(fifty.path), str(tmp_path)), nprocs=size)
        for rank in range(size):
            other = torch.load(tmp_path / f"{size}-{rank}.pt")
            assert all(torch.equal(one[name], other[name]) for name in one), (size, rank)


@pytest.mark.parametrize(("refit", "at", "counts_again"), [("false", 8, False), ("true", 30, True)])
def test_killed_run_resumes_bit_identical_and_counts_once_per_phase(
    fifty, tmp_path, monkeypatch, refit, at, counts_again
):
    """Killed in the first epoch; and with a refit in the second, after which only the refit counts."""
    more = (START, f"train.refit={refit}", "train.epochs=2")
    assert main(options(fifty, tmp_path / "calm", *more)) == 0
    with killed_at_step(at):
        main(options(fifty, tmp_path / "run", *more))
    assert not (tmp_path / "run" / "summary.json").exists()
    holdouts, start = [], trainer.task.sessions.ppmi_vectors

    def counted(dataset, holdout, dimension, seed):
        holdouts.append(holdout)
        return start(dataset, holdout, dimension, seed)

    monkeypatch.setattr(trainer.task.sessions, "ppmi_vectors", counted)
    assert main(options(fifty, tmp_path / "run", *more)) == 0
    assert holdouts == ([1] if counts_again else [])
    assert_same_run(tmp_path / "calm", tmp_path / "run")


def test_too_little_memory_is_refused_with_the_requirement(fifty, tmp_path, monkeypatch, capfd):
    no_memory(monkeypatch)
    assert main(options(fifty, tmp_path / "run", START)) == 2
    error = capfd.readouterr().err
    assert "free memory for train.ppmi_start, got 0.0 GiB" in error
    assert "train.ppmi_start=0" in error
    assert main(options(fifty, tmp_path / "other", "train.ppmi_start=0", "train.epochs=1")) == 0


def test_memory_requirement_grows_with_clicks_and_items(monkeypatch):
    """QK-video's 72,066,187 clicks on 3,753,436 items fit into 24 GiB but not 12; 120,000 clicks fit into 1 GiB."""
    monkeypatch.setattr(cooccurrence.psutil, "virtual_memory", lambda: SimpleNamespace(available=24 * 2**30))
    cooccurrence.check_memory(72_066_187, 3_753_436, 128)
    monkeypatch.setattr(cooccurrence.psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * 2**30))
    with pytest.raises(InputError, match=r"15\.5 GiB"):
        cooccurrence.check_memory(72_066_187, 3_753_436, 128)
    monkeypatch.setattr(cooccurrence.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    cooccurrence.check_memory(120_000, 11_924, 128)
