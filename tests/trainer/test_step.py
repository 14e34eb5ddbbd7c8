"""One training step: rows it updates, non-finite values, and equality of several workers to one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from etl.dataset import open_dataset
from tests.support.workers import run_workers
from trainer.config import HEADS, RANK_HEADS, TrainerConfig
from trainer.data.batch import BatchOptions, train_batch
from trainer.data.order import Order, share
from trainer.data.reader import SessionReader
from trainer.distributed.world import World
from trainer.option_groups import ModelOptions, TrainOptions
from trainer.run.checkpoint import all_tensors
from trainer.task.registry import model_task_of
from trainer.task.sessions import first_biases
from trainer.training.objective import ITEM, Balance, Candidates, LossSums
from trainer.training.step import NotFiniteError, TrainStep

TASKS = ["next", "click", "like", "share"]


def config(data, network=None, train=None, **changes) -> TrainerConfig:
    small = {"embedding_dim": 8, "hidden_size": 8, "experts": 3, "tower": 8, "positions": 30}
    options = ModelOptions(**small | {"embedding_dropout": 0.0, "state_dropout": 0.0} | (network or {}))
    training = TrainOptions(**{"batch_tokens": 128, "negatives": 32, "shuffle_buffer_sessions": 64} | (train or {}))
    arguments = {"model": "hybrid", "tasks": list(TASKS)} | changes
    if arguments["model"].startswith("rank"):
        arguments["tasks"] = TASKS[1:]
    return TrainerConfig(data=str(data), output="", network=options, train=training, **arguments)


def make_stepper(settings: TrainerConfig, dataset, world: World) -> TrainStep:
    return model_task_of(settings, dataset, world).train_step(total_steps=10)


def some_batch(dataset, tasks=TASKS[1:], rows=slice(None)):
    sessions = SessionReader(dataset, exposures=True, holdout=2).read(np.array([0]))
    options = BatchOptions(holdout=2, tasks=tasks, exposures=True, rows_per_session=9, salt=0)
    return train_batch(sessions.take(np.arange(len(sessions))[rows]), options)


def ten_steps(settings: TrainerConfig, world: World, steps: int = 10) -> TrainStep:
    dataset = open_dataset(settings.data)
    model_task = model_task_of(settings, dataset, world)
    train_step, reader = model_task.train_step(steps), model_task.reader(2)
    train_step.model.train()
    taken = 0
    while taken < steps:
        order = Order(reader.group_rows, 0, taken, dataset.manifest.fingerprint, 128, 64)
        batches = reader.epoch(
            order, model_task.collate(2, 1), start=0, global_rank=world.global_rank, world_size=world.size
        )
        for batch in batches:
            if taken == steps:
                break
            train_step.step([batch.data], taken)
            taken += 1
    return train_step


def state_of(train_step: TrainStep) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in all_tensors(train_step).items()}


def worker(rank: int, size: int, port: int, settings: TrainerConfig, folder: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    torch.save(state_of(ten_steps(settings, World(rank, size, torch.device("cpu")))), f"{folder}/{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo sometimes abort at interpreter exit; the result is already on disk.
    os._exit(0)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


ALIKE = {
    "sampled softmax": {},
    "softmax": {"loss": "softmax"},
    "hard negatives, cosine": {"network": {"cosine_temperature": 0.2}, "train": {"hard_negatives": 5}},
    "options": {
        "encoder": ["srgnn", "sasrec", "nextitnet"],
        "head": "ple",
        "loss": "bpr_max",
        "network": {"tie_embeddings": False, "profile": True, "item_features": ["category"]},
        "train": {
            "batch_positives": True,
            "skipped_negatives": 2,
            "prefixes": 6,
            "balance": "uncertainty",
            "max_grad_norm": 0.5,
            "optimizer": "adamw",
            "schedule": "cosine",
            "table_optimizer": "adagrad",
            "positive_power": 0.5,
            "positive_rates": {"like": 0.3},
        },
    },
    "inputs and gates": {
        "loss": "softmax",
        "train": {"optimizer": "adamw"},
        "network": {
            "past_actions": True,
            "task_embedding_dim": 2,
            "item_features": ["category"],
            "feedback_feature_dim": 3,
            "feedback_features": ["category"],
            "feedback_actions": True,
            "expert_norm": True,
            "gate_preference": 1.0,
        },
    },
    "ranking": {"model": "rank_ple", "network": {"item_features": ["category"]}},
}
"""Configurations in which several workers must equal one."""


# In float64, since the first step of Adagrad and Adam is the learning rate times the sign of the gradient: if that is
# near 0, rounding decides, and in float32 one element in thousands differs by 1e-4 on one processor and not another.
# The remaining tolerance is for torch's DDP, which averages over three workers with 1/3 in float32.
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("name", "dtype"), [("sampled softmax", torch.float32), *((name, torch.float64) for name in ALIKE)]
)
def test_ten_steps_on_two_and_three_workers_equal_one_worker(fifty, tmp_path, name, dtype):
    settings = config(fifty.path, **ALIKE[name])
    with default_dtype(dtype):
        one = state_of(ten_steps(settings, World.alone()))
    for size in (2, 3):
        run_workers(worker, (size, free_port(), settings, str(tmp_path), dtype), nprocs=size)
        states = [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]
        for tensor, expected in one.items():
            assert torch.allclose(states[0][tensor], expected, atol=1e-5), (size, tensor)
            for other in states[1:]:
                assert torch.equal(states[0][tensor], other[tensor]), (size, tensor)


TRAINED = [
    *({"head": head} for head in HEADS),
    *({"model": model} for model in RANK_HEADS),
    {"encoder": ["gru4rec", "srgnn", "sasrec", "nextitnet"], "network": {"profile": True, "layers": 2}},
    {"train": {"balance": "uncertainty"}},
    *({"head": head, "network": {"expert_norm": True, "gate_preference": 2.0}} for head in ("mmoe", "ple")),
    {"network": {"task_embedding_dim": 3}},
    {"network": {"task_embedding_dim": 3, "item_features": ["category"]}},
    {"network": {"feedback_feature_dim": 3, "feedback_features": ["category"], "feedback_actions": True}},
    {"model": "rank_mmoe", "network": {"expert_norm": True, "gate_preference": 2.0}},
    {"network": {"tie_embeddings": False, "profile": True, "item_features": ["category"], "past_actions": True}},
]


@pytest.mark.parametrize("changes", TRAINED, ids=str)
def test_every_parameter_of_every_model_gets_a_gradient_and_changes(fifty, changes, device):
    settings, world = config(fifty.path, **changes), World(0, 1, device)
    before, after = make_stepper(settings, fifty, world), ten_steps(settings, world, steps=1)
    names = dict(before.objective.named_parameters())
    optimized = {id(p) for p in after.optimizer.rates}
    for name, parameter in after.objective.named_parameters():
        assert id(parameter) in optimized, name
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert not torch.equal(parameter, names[name]), name
    for name, table in after.tables.items():
        assert not torch.equal(table.vector, before.tables[name].vector), name
        assert not table.vector[0].any()


def test_gates_and_experts_of_a_hybrid_are_registered_parameters(fifty):
    names = dict(make_stepper(config(fifty.path), fifty, World.alone()).model.named_parameters())
    assert sum("gates" in name for name in names) == len(TASKS)
    assert sum("experts" in name for name in names) == 4 * 3


def test_head_and_feedback_towers_can_have_their_own_learning_rates(fifty):
    network = {"profile": True, "past_actions": True, "feedback_features": ["category"], "feedback_feature_dim": 3}
    train = {"balance": "uncertainty", "network_learning_rate": 0.1}
    rates = [{}, {"head_learning_rate": 0.01}, {"head_learning_rate": 0.01, "feedback_learning_rate": 0.2}]
    world = World.alone()
    steppers = [ten_steps(config(fifty.path, network, train | own), world, steps=1) for own in rates]
    start = make_stepper(config(fifty.path, network, train), fifty, world)
    parts = [dict(stepper.objective.named_parameters()) for stepper in (start, *steppers)]
    encoding = ("model.encoders.", "model.profile.", "model.past_actions.")
    feedback = ("model.towers.", "model.feedback_features.")
    assert all(any(name.startswith(part) for name in parts[0]) for part in (*encoding, *feedback))
    for name, before in parts[0].items():
        changed, own_head, own_towers = (part[name] - before for part in parts[1:])
        # The first step of Adagrad is the rate × the sign of the gradient.
        of_head = 1.0 if name.startswith(encoding) else 0.1
        assert torch.allclose(own_head, of_head * changed, atol=1e-6), name
        of_towers = 2.0 if name.startswith(feedback) else of_head
        assert torch.allclose(own_towers, of_towers * changed, atol=1e-6), name
    alone = config(fifty.path, train=train | rates[2], model="gru4rec", tasks=["next"])
    assert set(make_stepper(alone, fifty, world).optimizer.rates.values()) == {0.1}


def test_step_updates_only_rows_of_its_batch_and_negatives(fifty, device):
    settings, world = config(fifty.path), World(0, 1, device)
    settings.train.negatives = 2
    settings.train.batch_tokens = 8
    before = make_stepper(settings, fifty, world)
    batch = some_batch(fifty, tasks=[], rows=slice(1))
    settings.tasks = ["next"]
    train_step = make_stepper(settings, fifty, world)
    train_step.step([batch], 0)
    negatives = train_step.objective.candidates(batch, 0).ids.tolist()
    touched = {*batch.items.flatten().tolist(), *batch.targets.flatten().tolist(), *negatives} - {0}
    changed = (train_step.tables[ITEM].vector != before.tables[ITEM].vector).any(1)
    assert set(torch.nonzero(changed).flatten().tolist()) <= touched
    assert changed[batch.targets[0, 0]]
    assert not train_step.tables[ITEM].vector[0].any()


def test_dropout_depends_on_seed_and_step_alone(fifty):
    def loss_of(step, seed=0):
        options = config(fifty.path, {"state_dropout": 0.5}, loss="softmax", tasks=["next"], seed=seed)
        train_step = make_stepper(replace(options, seed=0), fifty, World.alone())  # equal parameters
        train_step.config = options
        return train_step.step([some_batch(fifty, tasks=[])], step)[0].item()

    assert loss_of(4) == loss_of(4)
    assert len({loss_of(4), loss_of(5), loss_of(4, seed=1)}) == 3


@pytest.mark.parametrize("loss", ["sampled_softmax", "bpr_max"])
def test_repeated_negatives_are_scored_once_and_weighted_by_their_count(fifty, loss, device):
    """32 draws from few items: the loss and every gradient equal those of scoring each draw separately."""
    train_step = make_stepper(config(fifty.path, loss=loss, tasks=["next"]), fifty, World(0, 1, device))
    batch, objective, actual = some_batch(fifty, tasks=[]).to(device), train_step.objective, []
    merged = objective.candidates(batch, 3)
    drawn = torch.from_numpy(objective.sampler.draw(32, seed=0, step=3)).to(device)
    assert len(merged.ids) < len(drawn)
    each = merged.log_copies[torch.searchsorted(merged.ids, drawn)]
    correction = merged.correction[torch.searchsorted(merged.ids, drawn)] - each * (loss == "sampled_softmax")
    for candidates in (merged, Candidates(drawn, correction, torch.zeros(32, device=device))):
        train_step.model.zero_grad()
        rows = {ITEM: train_step.tables[ITEM].rows(torch.unique(objective.lookup_ids(batch, candidates)[ITEM]))}
        total = objective(batch, rows, candidates).loss[0]
        total.backward()
        actual.append([total.detach(), rows[ITEM].gradient(), *(p.grad for p in train_step.model.parameters())])
    for one, other in zip(*actual, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("logq", [0.0, 0.4, 1.0])
def test_logq_option_scales_the_correction_of_sampled_scores(fifty, logq):
    train_step = make_stepper(config(fifty.path, train={"logq": logq}), fifty, World.alone())
    objective = train_step.objective
    candidates = objective.candidates(some_batch(fifty), 3)
    drawn = objective.sampler.draw(32, seed=0, step=3)
    for item, correction in zip(candidates.ids.tolist(), candidates.correction.tolist(), strict=True):
        expected = 32 * np.exp(objective.sampler.log_q(np.array([item])))[0]
        assert correction == pytest.approx(np.log((drawn == item).sum()) - logq * np.log(expected), abs=1e-5)


def test_clipping_scales_all_gradients_by_the_same_factor(fifty, device):
    """The first AdaGrad step does not depend on the gradient's scale, but its accumulators hold the squares."""
    train_steps = [
        ten_steps(config(fifty.path, train={"max_grad_norm": clip}), World(0, 1, device), steps=1)
        for clip in (0.0, 0.05)
    ]
    free, clipped = (
        [
            *(s.optimizer.state[p]["sum"].sum().item() for p in s.model.parameters()),
            s.tables[ITEM].vector_state.sum().item() * 8,
            s.tables[ITEM].bias_state.sum().item(),
        ]
        for s in train_steps
    )
    shrunk = np.array(clipped) / np.array(free)
    assert shrunk == pytest.approx(np.full(len(shrunk), shrunk[0]), rel=1e-3)
    assert sum(clipped) == pytest.approx(0.05**2, rel=1e-3)


def test_uncertainty_balance_weights_tasks_by_the_papers_formula():
    settings = config("", train={"balance": "uncertainty", "task_weights": {"like": 2.0}})
    balance = Balance(settings, ["next", "like"])
    with torch.no_grad():
        balance.log_variance.copy_(torch.tensor([0.3, -1.2]))
    loss_sums = LossSums(torch.tensor([10.0, 4.0]), balance.variances())
    actual = balance.total(loss_sums, torch.tensor([5.0, 8.0]), 1)
    expected = np.exp(-0.3) * 10 / 5 + 0.3 / 2 + np.exp(1.2) * 2 * 4 / 8 - 1.2 / 2
    assert actual.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"train": {"balance": "uncertainty"}}, {"model": "rank_esmm"}], ids=str)
def test_gradient_accumulation_equals_a_step_on_the_full_batch(fifty, changes, device):
    settings = config(fifty.path, **changes)
    model_task = model_task_of(settings, fifty, World(0, 1, device))
    reader, collate = model_task.reader(2), model_task.collate(2, 1)
    window, rows = reader.read(np.array([0])), np.arange(9)
    whole, parts = (model_task.train_step(10) for _ in range(2))
    for step in range(3):
        whole.step([collate(window, rows, rows)], step)
        parts.step([collate(window, share(rows, part, 4), rows) for part in range(4)], step)
    for name, value in state_of(whole).items():
        assert torch.allclose(value, state_of(parts)[name], atol=1e-5), name


def test_non_finite_step_updates_nothing_and_reports_its_number(fifty, device):
    train_step = ten_steps(config(fifty.path), World(0, 1, device), steps=1)
    with torch.no_grad():
        train_step.tables[ITEM].vector[3] = torch.nan
    before = state_of(train_step)
    batch = some_batch(fifty)
    with pytest.raises(NotFiniteError, match="step 41"):
        train_step.step([batch], 41)
    for name, value in state_of(train_step).items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_initial_biases_give_each_item_its_share_of_the_clicks():
    clicks = np.array([0, 3, 99, 7])
    config = TrainerConfig(data="", output="", model="gru4rec", loss="sampled_softmax")
    assert not first_biases(config, clicks).any()
    config.network.popularity_bias = True
    np.testing.assert_allclose(torch.softmax(first_biases(config, clicks), 0), (clicks + 1) / 113, rtol=1e-6)
    config.loss = "gbce"
    np.testing.assert_allclose(torch.exp(first_biases(config, clicks)), 0.25)
