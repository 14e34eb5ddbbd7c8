"""Training on a GPU against the CPU."""

from __future__ import annotations

import pytest
import torch

from retrieval.bundle import open_bundle
from tests.support.runs import options
from tests.trainer.test_step import ALIKE, config, default_dtype, make_stepper, some_batch, state_of, ten_steps
from trainer.__main__ import main
from trainer.distributed.world import World
from trainer.task.registry import model_task_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ALIKE)
def test_ten_steps_and_validation_on_a_gpu_equal_the_cpu(fifty, name, gpu):
    """In float64, like the comparison of workers in `test_step.py`."""
    settings, states, metrics = config(fifty.path, **ALIKE[name]), [], []
    with default_dtype(torch.float64):
        for device in (torch.device("cpu"), gpu):
            world = World(0, 1, device)
            train_step, model_task = ten_steps(settings, world), model_task_of(settings, fifty, world)
            states.append({name: tensor.cpu() for name, tensor in state_of(train_step).items()})
            metrics.append(model_task.validate(train_step, model_task.sample()).metrics)
    for tensor, expected in states[0].items():
        assert torch.allclose(states[1][tensor], expected, atol=1e-5), tensor
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)


def test_losses_of_a_bfloat16_step_are_close_to_float32(fifty, gpu):
    losses = []
    for precision in ("float32", "bfloat16"):
        train_step = make_stepper(config(fifty.path, train={"precision": precision}), fifty, World(0, 1, gpu))
        losses.append(train_step.step([some_batch(fifty)], 0)[0].cpu())
    assert torch.allclose(losses[1], losses[0], rtol=0.02)
    assert not torch.equal(losses[1], losses[0])


def test_run_on_a_gpu_writes_a_bundle(fifty, tmp_path, gpu):
    assert main(options(fifty, tmp_path / "run", "train.epochs=1")) == 0
    assert open_bundle(tmp_path / "run" / "bundle").manifest.dataset == fifty.manifest.fingerprint
