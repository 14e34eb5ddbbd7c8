"""Gates with an initial preference, normalised experts, inputs of the feedback towers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.inference.validation import FeedbackSums
from trainer.models.feedback import FeedbackInputs
from trainer.models.heads import PLE, RESIDUAL_INIT_SCALE, Layout, MMoE, expert
from trainer.models.recommender import Recommender
from trainer.option_groups import ModelOptions

TASKS = ["next", "click", "like", "share", "follow"]


def options(**changes) -> ModelOptions:
    return ModelOptions(**{"embedding_dim": 6, "hidden_size": 6, "experts": 8} | changes)


@pytest.mark.parametrize("residual", [False, True])
def test_normalised_expert_equals_swish_of_layer_norm_of_a_plain_expert(residual):
    torch.manual_seed(0)
    made, state = expert(6, options(residual=residual, expert_norm=True)), torch.randn(7, 6)
    plain = made.network[:3](state) if residual else made[0](state)
    norm = (plain - plain.mean(1, keepdim=True)) / (plain.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    if residual:
        assert (made.network[3].weight == RESIDUAL_INIT_SCALE).all()
        torch.nn.init.ones_(made.network[3].weight)
    expected = norm * torch.sigmoid(norm) + (state if residual else 0)
    assert torch.allclose(made(state), expected, atol=1e-5)
    loud, louder = (made(size * state) - (size * state if residual else 0) for size in (100, 1000))
    assert torch.allclose(loud, louder, atol=0.2)  # the scale of the input does not matter


def test_gate_preference_assigns_each_expert_to_one_task_initially():
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


def test_default_gates_and_experts_have_the_parameters_of_the_paper():
    names = {name for name, _ in MMoE(Layout((5,)), options(residual=False), TASKS).named_parameters()}
    experts = {f"experts.{e}.0.{kind}" for e in range(8) for kind in ("weight", "bias")}
    assert names == experts | {f"gates.{task}.weight" for task in TASKS}


def test_gate_statistics_are_mean_weights_lead_shares_and_entropy():
    feedback = FeedbackSums([])
    weight = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.2, 0.5, 0.3]])
    for part in (weight[:1], weight[1:]):
        feedback.add_gates({"like": part})
    actual = feedback.merged(World.alone(), {})
    assert actual.gates["like"] == pytest.approx(weight.mean(0))
    assert actual.leads["like"] == [0.5, 0.5, 0.0]
    assert actual.entropy["like"] == pytest.approx(-(weight * np.log(weight)).sum(1).mean())


def test_tower_reads_its_own_task_embeddings_and_feature_embeddings():
    torch.manual_seed(0)
    network = options(task_embedding_dim=3, feedback_features=["category", "tag"], feedback_feature_dim=2)
    config = TrainerConfig(data="", output="", model="hybrid", tasks=TASKS[:3], network=network)
    model = Recommender(config, feedback_codes=torch.tensor([[0, 0], [1, 4], [2, 0], [3, 4]])).eval()
    item, row, item_FD, own = torch.tensor([3, 1, 2]), torch.tensor([0, 3, 3]), torch.randn(3, 6), torch.randn(3, 6)
    state, mixes = torch.randn(4, 6 + 2), {"click": torch.randn(4, 6), "like": torch.randn(4, 6)}
    mix, tower = mixes["like"], model.towers["like"]
    own_mix, of_like = tower.own_mix(mix)[row], own[:, 3:]
    first = torch.cat([mix[row], item_FD, mix[row] * item_FD], dim=1)
    first = first @ tower.network[0].weight.T + tower.network[0].bias
    hidden = first + torch.cat([of_like, own_mix * of_like], dim=1) @ tower.own_hidden.weight.T
    of_value = model.feedback_features.embedding.weight
    of_item = torch.stack([of_value[3] + of_value[4], of_value[1] + of_value[4], of_value[2]])
    of_clicks, by_mix = state[row, 6:], tower.feature_mix(mix)[row]
    read = torch.cat([of_item, of_clicks, of_item * of_clicks, of_item * by_mix], dim=1)
    hidden = hidden + read @ tower.feature_hidden.weight.T
    expected = torch.relu(hidden) @ tower.network[2].weight[0] + tower.network[2].bias
    actual = model.feedback_logits(state, mixes, row, item, item_FD, own)
    assert list(actual) == ["click", "like"]
    assert torch.allclose(actual["like"], expected, atol=1e-5)
    other = torch.cat([torch.randn(3, 3), of_like], dim=1)  # only the click part differs
    actual = model.feedback_logits(state, mixes, row, item, item_FD, other, only={"like"})
    assert list(actual) == ["like"]
    assert torch.allclose(actual["like"], expected, atol=1e-5)
    plain = str(Recommender(replace(config, network=options(feedback_feature_dim=2))))
    assert "own_mix" not in plain
    assert "feature_mix" not in plain  # no features are given


@given(sessions=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=7), min_size=1, max_size=4))
def test_features_of_clicks_are_the_mean_over_the_clicks_so_far(sessions):
    codes = np.array([[0, 0], [1, 3], [2, 0], [1, 2], [0, 0]])
    features = FeedbackInputs(torch.from_numpy(codes), 3, actions=False)
    of_value = features.embedding.weight.detach().double().numpy()
    assert not of_value[0].any()  # unknown
    items = torch.zeros(len(sessions), 8, dtype=torch.int64)
    expected, needed = [], []
    for row, clicks in enumerate(sessions):
        items[row, : len(clicks)] = torch.tensor(clicks)
        for last in range(len(clicks)):
            needed.append(row * 8 + last)
            expected.append(np.mean([of_value[codes[i]].sum(0) for i in clicks[: last + 1]], axis=0))
    actual = features.clicked(items, torch.tensor(needed)).detach().numpy()
    assert actual == pytest.approx(np.array(expected), abs=1e-6)
