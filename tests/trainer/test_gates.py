"""Gates that begin with a preference, experts of alike scale, embeddings of a task's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.inference.validation import FeedbackSums
from trainer.models.heads import PLE, SMALL, Layout, MMoE, expert
from trainer.models.recommender import Recommender
from trainer.option_groups import ModelOptions

TASKS = ["next", "click", "like", "share", "follow"]


def options(**changes) -> ModelOptions:
    return ModelOptions(**{"embedding_dim": 6, "hidden_size": 6, "experts": 8} | changes)


@pytest.mark.parametrize("residual", [False, True])
def test_a_normalised_expert_is_swish_of_the_layer_norm_of_a_plain_one(residual):
    torch.manual_seed(0)
    made, state = expert(6, options(residual=residual, expert_norm=True)), torch.randn(7, 6)
    plain = made.network[:3](state) if residual else made[0](state)
    norm = (plain - plain.mean(1, keepdim=True)) / (plain.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    if residual:
        assert (made.network[3].weight == SMALL).all()
        torch.nn.init.ones_(made.network[3].weight)
    expected = norm * torch.sigmoid(norm) + (state if residual else 0)
    assert torch.allclose(made(state), expected, atol=1e-5)
    loud, louder = (made(size * state) - (size * state if residual else 0) for size in (100, 1000))
    assert torch.allclose(loud, louder, atol=0.2)  # how loud it is makes no difference


def test_each_task_begins_with_experts_of_its_own_and_none_is_without_a_task():
    head = MMoE(Layout((5,)), options(gate_preference=2.0), TASKS)
    weights = head.gate_weights(torch.zeros(1, 5))
    owners = np.zeros(8, int)
    for number, task in enumerate(TASKS):
        own = [e % 5 == number for e in range(8)]
        expected = functional.softmax(2.0 * torch.tensor(own).float(), dim=0)
        assert torch.allclose(weights[task][0], expected)
        owners += own
    assert owners.tolist() == [1] * 8
    ple = PLE(Layout((5,)), options(gate_preference=2.0, task_experts=1, shared_experts=3), TASKS)
    expected = torch.tensor([np.e**2, 1, 1, 1]) / (np.e**2 + 3)
    zeros = dict.fromkeys([*TASKS, "shared"], torch.zeros(1, 5))
    for weight in ple.levels[0].gate_weights(zeros).values():
        if weight.shape[1] == 4:
            assert torch.allclose(weight[0], expected)


def test_without_the_options_gates_and_experts_have_the_parameters_of_the_paper():
    names = {name for name, _ in MMoE(Layout((5,)), options(residual=False), TASKS).named_parameters()}
    experts = {f"experts.{e}.0.{kind}" for e in range(8) for kind in ("weight", "bias")}
    assert names == experts | {f"gates.{task}.weight" for task in TASKS}


def test_a_gates_load_is_its_mean_weight_and_how_often_each_expert_leads():
    feedback = FeedbackSums([])
    weight = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.2, 0.5, 0.3]])
    for part in (weight[:1], weight[1:]):
        feedback.add_gates({"like": part})
    actual = feedback.merged(World.alone(), {})
    assert actual.gates["like"] == pytest.approx(weight.mean(0))
    assert actual.leads["like"] == [0.5, 0.5, 0.0]
    assert actual.entropy["like"] == pytest.approx(-(weight * np.log(weight)).sum(1).mean())


def test_a_tower_reads_the_embeddings_of_its_own_task():
    torch.manual_seed(0)
    network = options(task_embedding_dim=3)
    config = TrainerConfig(data="", output="", model="hybrid", tasks=TASKS[:3], network=network)
    model = Recommender(config).eval()
    mix, row, item, own = torch.randn(4, 6), torch.tensor([0, 3, 3]), torch.randn(3, 6), torch.randn(3, 6)
    tower = model.towers["like"]
    own_mix, of_like = tower.own_mix(mix)[row], own[:, 3:]
    first = torch.cat([mix[row], item, mix[row] * item], dim=1) @ tower.network[0].weight.T + tower.network[0].bias
    hidden = first + torch.cat([of_like, own_mix * of_like], dim=1) @ tower.own_hidden.weight.T
    expected = torch.relu(hidden) @ tower.network[2].weight[0] + tower.network[2].bias
    assert torch.allclose(model.feedback_logits("like", mix, row, item, own), expected, atol=1e-5)
    other = torch.cat([torch.randn(3, 3), of_like], dim=1)  # those of click
    assert torch.allclose(model.feedback_logits("like", mix, row, item, other), expected, atol=1e-5)
    assert "own_mix" not in str(Recommender(replace(config, network=options())))
