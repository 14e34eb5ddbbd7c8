"""Encoders and heads against the papers' formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.config import ModelOptions, TrainerConfig
from trainer.models.gru4rec import GRUEncoder
from trainer.models.mmoe import MMoE
from trainer.models.recommender import Recommender

TASKS = ["next", "click", "like"]


def config(**changes) -> TrainerConfig:
    network = ModelOptions(dimension=6, hidden=5, experts=3, tower=4, embedding_dropout=0.0, state_dropout=0.0)
    return TrainerConfig(data="", output="", model="hybrid", tasks=list(TASKS), network=network, **changes)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru_by_steps(gru: torch.nn.GRU, x_TD: np.ndarray) -> np.ndarray:
    """Cho et al. 2014 in the reset-after form that cuDNN and torch use, one step at a time."""
    w, u, b, c = (
        p.detach().double().numpy() for p in (gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)
    )
    h, states = np.zeros(u.shape[1]), []
    for x in x_TD:
        (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(w @ x + b, 3), np.split(u @ h + c, 3)
        r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
        h = (1 - z) * np.tanh(n_x + r * n_h) + z * h
        states.append(h)
    return np.array(states)


def test_gru_equals_a_step_by_step_numpy_version():
    torch.manual_seed(0)
    encoder = GRUEncoder(config().network).eval()
    clicks = torch.randn(4, 7, 6)
    found = encoder(clicks).detach().numpy()
    for session in range(4):
        assert found[session] == pytest.approx(gru_by_steps(encoder.gru, clicks[session].double().numpy()), abs=1e-6)


def test_mmoe_equals_the_papers_formula():
    torch.manual_seed(0)
    head, state = MMoE(5, 6, 3, TASKS), torch.randn(8, 5)
    found = {task: mix.detach().numpy() for task, mix in head(state).items()}
    h = state.numpy().astype(np.float64)
    experts = [np.maximum(h @ e[0].weight.detach().numpy().T + e[0].bias.detach().numpy(), 0) for e in head.experts]
    for task in TASKS:
        logits = h @ head.gates[task].weight.detach().numpy().T
        gate = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert found[task] == pytest.approx(sum(gate[:, [e]] * experts[e] for e in range(3)), abs=1e-5)


@pytest.mark.parametrize("head", ["mmoe", "shared_bottom", "single"])
def test_padding_batch_composition_and_order_change_no_state(head):
    torch.manual_seed(0)
    model = Recommender(config(head=head)).eval()
    clicks, profile = torch.randn(5, 9, 6), torch.zeros(5, 2, dtype=torch.long)
    whole = model.states(clicks, profile)
    assert torch.allclose(whole[2:3, :4], model.states(clicks[2:3, :4], profile[2:3]), atol=1e-6)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(whole[order], model.states(clicks[order], profile), atol=1e-6)
    mixes, alone = model.mixes(whole.flatten(0, 1)), model.mixes(whole[2, :3])
    for task in TASKS:
        assert torch.allclose(mixes[task].view(5, 9, -1)[2, :3], alone[task], atol=1e-6)


def test_a_later_click_changes_no_earlier_state():
    torch.manual_seed(0)
    model = Recommender(config()).eval()
    clicks, profile = torch.randn(1, 6, 6), torch.zeros(1, 2, dtype=torch.long)
    changed = clicks.clone()
    changed[0, 4] += 1.0
    before, after = model.states(clicks, profile), model.states(changed, profile)
    assert torch.equal(before[0, :4], after[0, :4])
    assert not torch.allclose(before[0, 4:], after[0, 4:])


def test_profile_joins_the_state_and_unknown_codes_share_one_vector():
    torch.manual_seed(0)
    settings = config()
    settings.network.profile = True
    model = Recommender(settings).eval()
    states = model.states(torch.zeros(4, 2, 6), torch.tensor([[1, 3], [-1, -1], [99, -1], [2, 3]]))
    assert states.shape == (4, 2, 5 + 8)
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[0], states[3])


def test_flops_count_two_for_each_weight_and_candidate():
    parts = Recommender(config()).flops(100, 6)
    assert parts["encoder"] == 2 * 3 * (5 * 6 + 5 * 5)
    assert parts["head"] == 2 * (3 * 5 * 6 + 3 * 5 * 3)
    assert parts["next tower"] == 2 * (6 * 4 + 4 * 6)
    assert parts["feedback towers"] == 2 * 2 * (18 * 4 + 4)
    assert parts["softmax"] == 2 * 100 * 6
