"""Encoders against the papers' formulas in NumPy, one session at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.small_models import every_place, options, sigmoid, weights
from trainer.models import srgnn
from trainer.models.encoders import build_encoder
from trainer.models.gru import gru_states
from trainer.models.gru4rec import GRUEncoder, drop_clicks
from trainer.models.srgnn import SRGNNEncoder
from trainer.option_groups import BLOCKS


def gru_by_steps(gru: torch.nn.GRU, x_TD: np.ndarray, layer: int = 0) -> np.ndarray:
    """Cho et al. 2014 in the reset-after form that cuDNN and torch use, one step at a time."""
    w, u, b, c = (weights(gru)[f"{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, states = np.zeros(u.shape[1]), []
    for x in x_TD:
        (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(w @ x + b, 3), np.split(u @ h + c, 3)
        r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
        h = (1 - z) * np.tanh(n_x + r * n_h) + z * h
        states.append(h)
    return np.array(states)


def test_dropped_clicks_are_complete_vectors_and_the_others_are_scaled_up():
    torch.manual_seed(0)
    clicks = torch.rand(200, 50, 6) + 0.5
    actual = drop_clicks(clicks, 0.2, training=True)
    kept = actual.any(2)
    assert kept.double().mean().item() == pytest.approx(0.8, abs=0.02)
    assert torch.allclose(actual[kept], clicks[kept] / 0.8)
    assert drop_clicks(clicks, 0.2, training=False) is clicks


def test_gru_equals_a_step_by_step_numpy_reference(device):
    torch.manual_seed(0)
    encoder = GRUEncoder(options(layers=2)).eval()
    clicks, items = torch.randn(4, 7, 6), torch.ones(4, 7, dtype=torch.long)
    moved = (t.to(device) for t in (items, clicks, every_place(items)))
    actual = encoder.to(device)(*moved).detach().cpu().numpy().reshape(4, 7, 5)
    encoder.cpu()
    for session in range(4):
        first = gru_by_steps(encoder.gru, clicks[session].double().numpy())
        assert actual[session] == pytest.approx(gru_by_steps(encoder.gru, first, layer=1), abs=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_training_gru_has_the_states_and_gradients_of_torchs_gru(layers):
    torch.manual_seed(0)
    gru = torch.nn.GRU(6, 5, layers, batch_first=True).double()
    clicks, weight = torch.randn(4, 7, 6).double().requires_grad_(), torch.randn(4, 7, 5).double()
    ours, theirs = gru_states(gru, clicks), gru(clicks)[0]
    assert torch.allclose(ours, theirs)
    leaves = (clicks, *gru.parameters())
    gradients = [torch.autograd.grad((state * weight).sum(), leaves) for state in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b)


def srgnn_by_graph(encoder: SRGNNEncoder, items: list[int], vector_of: dict[int, np.ndarray]) -> np.ndarray:
    """The state after a session's last click, from its graph by equations 1 to 7 of Wu et al."""
    p = weights(encoder)
    nodes = list(dict.fromkeys(items))
    n = len(nodes)
    edges = np.zeros((n, n))
    for a, b in itertools.pairwise(items):
        edges[nodes.index(a), nodes.index(b)] += 1
    outgoing, incoming = np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if edges[i].sum():
                outgoing[i, j] = edges[i, j] / edges[i].sum()
            if edges[:, i].sum():
                incoming[i, j] = edges[j, i] / edges[:, i].sum()
    v = np.array([vector_of[item] for item in nodes])
    w_z, w_r, w_o = np.split(p["from_edges.weight"], 3)
    b_z, b_r, b_o = np.split(p["from_edges.bias"], 3)
    u_z, u_r = np.split(p["from_node.weight"], 2)
    for _ in range(encoder.steps):
        after = np.zeros_like(v)
        for i in range(n):
            sent_out = sum(outgoing[i, j] * (p["outgoing.weight"] @ v[j]) for j in range(n))
            sent_in = sum(incoming[i, j] * (p["incoming.weight"] @ v[j]) for j in range(n))
            a = np.concatenate([sent_out, sent_in])
            z, r = sigmoid(w_z @ a + b_z + u_z @ v[i]), sigmoid(w_r @ a + b_r + u_r @ v[i])
            candidate = np.tanh(w_o @ a + b_o + p["from_reset.weight"] @ (r * v[i]))
            after[i] = (1 - z) * v[i] + z * candidate
        v = after
    last, attended = v[nodes.index(items[-1])], np.zeros(v.shape[1])
    for item in items:
        own = v[nodes.index(item)]
        asked = p["attend_last.weight"] @ last + p["attend_last.bias"] + p["attend_node.weight"] @ own
        attended += (p["attention.weight"] @ sigmoid(asked)) * own
    return p["join.weight"] @ np.concatenate([last, attended])


@pytest.mark.parametrize("steps", [1, 2])
@given(sessions=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=8), min_size=1, max_size=4))
@settings(max_examples=20)
def test_srgnn_equals_a_loop_over_single_graphs_for_every_prefix(steps, sessions):
    torch.manual_seed(0)
    encoder = SRGNNEncoder(options(gnn_steps=steps)).eval()
    table = torch.randn(5, 6)
    table[0] = 0.0
    width = max(map(len, sessions))
    items = torch.tensor([session + [0] * (width - len(session)) for session in sessions])
    needed = torch.nonzero(items.flatten()).squeeze(1)
    actual = iter(encoder(items, table[items], needed).detach().numpy())
    vector_of = dict(enumerate(table.double().numpy()))
    for session in sessions:
        for end in range(1, len(session) + 1):
            assert next(actual) == pytest.approx(srgnn_by_graph(encoder, session[:end], vector_of), abs=1e-5)


def test_srgnn_builds_the_graphs_of_long_sessions_in_chunks(monkeypatch):
    """All graphs at once need memory cubic in the length; chunks give the same states and gradients."""
    made, graphs_of = [], srgnn.session_graphs

    def counted(items, needed):
        made.append(len(needed) * items.shape[1] ** 2)
        return graphs_of(items, needed)

    monkeypatch.setattr(srgnn, "session_graphs", counted)
    torch.manual_seed(0)
    encoder, table = SRGNNEncoder(options()), torch.randn(9, 6)
    items = torch.randint(1, 9, (2, 40))
    needed, outcomes = torch.arange(1, 80, 2), []
    for most in (1 << 24, 3 * 40**2):
        monkeypatch.setattr(srgnn, "CHUNK_EDGES", most)
        torch.manual_seed(1)
        click = table[items].requires_grad_()
        state = encoder(items, click, needed)
        outcomes.append([state, *torch.autograd.grad(state.square().sum(), [click, *encoder.parameters()])])
    assert made[0] == 40 * 40**2
    assert max(made[1:]) == 3 * 40**2
    for a, b in zip(*outcomes, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def attention_by_position(encoder, x_TD: np.ndarray) -> np.ndarray:
    """Kang and McAuley 2018, or the block of eSASRec, position by position and head by head."""
    p = weights(encoder)

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def gathered(h, t, name, heads=encoder.blocks[0].attention.heads):
        parts = [np.split(p[f"{name}.attention.project.weight"] @ norm(x, f"{name}.before_attention"), 3) for x in h]
        out = []
        for head, part in enumerate(np.split(np.arange(size), heads)):
            logit = np.array([parts[t][0][part] @ parts[s][1][part] / np.sqrt(len(part)) for s in range(t + 1)])
            if f"{name}.attention.bias_by_distance" in p:
                logit += [p[f"{name}.attention.bias_by_distance"][head, t - s] for s in range(t + 1)]
            share = np.exp(logit) / np.exp(logit).sum()
            out.append(sum(share[s] * parts[s][2][part] for s in range(t + 1)))
        return p[f"{name}.attention.join.weight"] @ np.concatenate(out) + p[f"{name}.attention.join.bias"]

    def changed(x, name):
        x = norm(x, f"{name}.before_network")
        if f"{name}.enter.weight" in p:
            swished, linear = np.split(p[f"{name}.enter.weight"] @ x, 2)
            return p[f"{name}.leave.weight"] @ (swished * sigmoid(swished) * linear)
        inner = np.maximum(p[f"{name}.network.0.weight"] @ x + p[f"{name}.network.0.bias"], 0)
        return p[f"{name}.network.3.weight"] @ inner + p[f"{name}.network.3.bias"]

    def gate(x, name):
        return sigmoid(p[f"{name}.weight"] @ x + p[f"{name}.bias"]) if f"{name}.weight" in p else 1.0

    size = x_TD.shape[1]
    h = np.array([x * np.sqrt(size) for x in x_TD])
    h += p["position.weight"][: len(h)] if "position.weight" in p else 0.0
    for i in range(len(encoder.blocks)):
        name, after = f"blocks.{i}", []
        for t, x in enumerate(h):
            x = x + gate(x, f"{name}.attention_gate") * gathered(h, t, name)
            after.append(x + gate(x, f"{name}.network_gate") * changed(x, name))
        h = np.array(after)
    return np.array([norm(x, "last") for x in h])


def test_nextitnet_equals_convolutions_computed_position_by_position():
    torch.manual_seed(0)
    encoder = build_encoder("nextitnet", options(embedding_dim=5, hidden_size=4, layers=2, dilations=[1, 3])).eval()
    clicks = torch.randn(7, 5)
    state = [encoder.enter(click) * 2.0 for click in clicks]  # √4
    for block in encoder.blocks:
        inner = state
        for convolution, norm in zip(block.convolutions, block.norms, strict=True):
            weight, bias = convolution.convolution.weight, convolution.convolution.bias
            dilation = convolution.convolution.dilation[0]
            out = []
            for position in range(7):
                total = bias.clone()
                for back, kernel in zip((2 * dilation, dilation, 0), weight.unbind(2), strict=True):
                    if position >= back:
                        total = total + kernel @ inner[position - back]
                out.append(torch.relu(norm(total)))
            inner = out
        state = [before + added for before, added in zip(state, inner, strict=True)]
    actual = encoder(torch.ones(1, 7, dtype=torch.long), clicks[None], torch.arange(7))
    assert torch.allclose(actual, torch.stack([encoder.last(s) for s in state]), atol=1e-6)
    assert [c.convolution.dilation[0] for b in encoder.blocks for c in b.convolutions] == [1, 2, 3, 6] * 2


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("relative", [False, True])
def test_sasrec_equals_attention_computed_position_by_position(block, relative):
    torch.manual_seed(0)
    sizes = {"hidden_size": 6, "attention_heads": 2, "layers": 2}
    encoder = build_encoder("sasrec", options(attention_block=block, relative_positions=relative, **sizes)).eval()
    for made in encoder.blocks if relative else ():
        torch.nn.init.normal_(made.attention.bias_by_distance)  # initialised to zero
    clicks, items = torch.randn(3, 7, 6), torch.ones(3, 7, dtype=torch.long)
    actual = encoder(items, clicks, every_place(items)).detach().numpy().reshape(3, 7, 6)
    for session in range(3):
        expected = attention_by_position(encoder, clicks[session].double().numpy())
        assert actual[session] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("changes", [{"attention_block": "ligr"}, {"relative_positions": True}], ids=str)
def test_sasrec_states_do_not_depend_on_later_clicks_or_padding(changes):
    torch.manual_seed(0)
    encoder = build_encoder("sasrec", options(layers=2, **changes)).eval()
    clicks, items = torch.randn(2, 7, 6), torch.ones(2, 7, dtype=torch.long)
    changed = clicks.clone()
    changed[:, 4:] = 0.0  # like padding
    before, after = (encoder(items, each, every_place(items)).view(2, 7, -1) for each in (clicks, changed))
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"attention_block": "ligr"}, {"relative_positions": True}], ids=str)
def test_sasrec_states_of_a_single_session_are_bit_identical_to_a_batch(changes):
    torch.manual_seed(0)
    sizes = {"embedding_dim": 32, "hidden_size": 32, "positions": 40, "layers": 2}
    encoder = build_encoder("sasrec", options(**sizes, **changes)).eval()
    clicks, items = torch.randn(20, 40, 32), torch.ones(20, 40, dtype=torch.long)
    with torch.inference_mode():
        together = encoder(items, clicks, every_place(items)).view(20, 40, 32)
        for session, n in enumerate(range(2, 40, 2)):
            alone = encoder(items[:1, :n], clicks[session : session + 1, :n], torch.arange(n))
            assert torch.equal(alone, together[session, :n])
