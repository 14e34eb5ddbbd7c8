"""Encoders, heads and rankers against the papers' formulas in numpy, one example at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import ENCODERS, RANK_HEADS, TrainerConfig
from trainer.models import srgnn
from trainer.models.encoders import build_encoder
from trainer.models.gru import gru_states
from trainer.models.gru4rec import GRUEncoder
from trainer.models.heads import HEADS, PLE, Layout, MMoE
from trainer.models.ranker import Ranker, product_logit
from trainer.models.recommender import Recommender
from trainer.models.srgnn import SRGNNEncoder
from trainer.option_groups import BLOCKS, ModelOptions

TASKS = ["next", "click", "like"]
MODELS = [*ENCODERS, ["gru4rec", "srgnn"], ["sasrec", "gru4rec", "srgnn"]]


def options(**changes) -> ModelOptions:
    small = {"embedding_dim": 6, "hidden_size": 5, "experts": 3, "tower": 4, "positions": 12}
    return ModelOptions(**small | {"embedding_dropout": 0.0, "state_dropout": 0.0} | changes)


def config(network=None, **changes) -> TrainerConfig:
    arguments = {"model": "hybrid", "tasks": list(TASKS), "network": network or options()}
    return TrainerConfig(data="", output="", **arguments | changes)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def weights(module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def every_place(items: torch.Tensor) -> torch.Tensor:
    return torch.arange(items.numel())


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


def test_gru_equals_a_step_by_step_numpy_version():
    torch.manual_seed(0)
    encoder = GRUEncoder(options(layers=2)).eval()
    clicks, items = torch.randn(4, 7, 6), torch.ones(4, 7, dtype=torch.long)
    actual = encoder(items, clicks, every_place(items)).detach().numpy().reshape(4, 7, 5)
    for session in range(4):
        first = gru_by_steps(encoder.gru, clicks[session].double().numpy())
        assert actual[session] == pytest.approx(gru_by_steps(encoder.gru, first, layer=1), abs=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_training_grus_states_and_gradients_are_those_of_torchs(layers):
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
    """The state after a session's last click: one graph, built and walked by Wu et al.'s equations 1 to 7."""
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
    last, whole = v[nodes.index(items[-1])], np.zeros(v.shape[1])
    for item in items:
        own = v[nodes.index(item)]
        asked = p["attend_last.weight"] @ last + p["attend_last.bias"] + p["attend_node.weight"] @ own
        whole += (p["attention.weight"] @ sigmoid(asked)) * own
    return p["join.weight"] @ np.concatenate([last, whole])


@pytest.mark.parametrize("steps", [1, 2])
@given(sessions=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=8), min_size=1, max_size=4))
@settings(deadline=None, max_examples=20)
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


def test_srgnn_makes_the_graphs_of_long_sessions_a_few_at_a_time(monkeypatch):
    """All graphs at once need memory by the cube of the length; parts give the same states and gradients."""
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


def test_nextitnet_equals_convolutions_position_by_position():
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
            for place in range(7):
                total = bias.clone()
                for back, kernel in zip((2 * dilation, dilation, 0), weight.unbind(2), strict=True):
                    if place >= back:
                        total = total + kernel @ inner[place - back]
                out.append(torch.relu(norm(total)))
            inner = out
        state = [before + added for before, added in zip(state, inner, strict=True)]
    actual = encoder(torch.ones(1, 7, dtype=torch.long), clicks[None], torch.arange(7))
    assert torch.allclose(actual, torch.stack([encoder.last(s) for s in state]), atol=1e-6)
    assert [c.convolution.dilation[0] for b in encoder.blocks for c in b.convolutions] == [1, 2, 3, 6] * 2


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("relative", [False, True])
def test_sasrec_equals_attention_position_by_position(block, relative):
    torch.manual_seed(0)
    sizes = {"hidden_size": 6, "attention_heads": 2, "layers": 2}
    encoder = build_encoder("sasrec", options(attention_block=block, relative_positions=relative, **sizes)).eval()
    for made in encoder.blocks if relative else ():
        torch.nn.init.normal_(made.attention.bias_by_distance)  # they begin at zero
    clicks, items = torch.randn(3, 7, 6), torch.ones(3, 7, dtype=torch.long)
    actual = encoder(items, clicks, every_place(items)).detach().numpy().reshape(3, 7, 6)
    for session in range(3):
        expected = attention_by_position(encoder, clicks[session].double().numpy())
        assert actual[session] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("changes", [{"attention_block": "ligr"}, {"relative_positions": True}], ids=str)
def test_a_later_click_or_padding_changes_no_state_of_sasrecs_options(changes):
    torch.manual_seed(0)
    encoder = build_encoder("sasrec", options(layers=2, **changes)).eval()
    clicks, items = torch.randn(2, 7, 6), torch.ones(2, 7, dtype=torch.long)
    changed = clicks.clone()
    changed[:, 4:] = 0.0  # as padding is
    before, after = (encoder(items, each, every_place(items)).view(2, 7, -1) for each in (clicks, changed))
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def expert_by_hand(network, h):
    """ReLU(W h + b), or h + W2 ReLU(W1 h + b1) + b2."""
    p = weights(network)
    if "straight.weight" not in p and "network.0.weight" not in p:
        return np.maximum(p["0.weight"] @ h + p["0.bias"], 0)
    straight = p["straight.weight"] @ h if "straight.weight" in p else h
    inner = np.maximum(p["network.0.weight"] @ h + p["network.0.bias"], 0)
    return straight + p["network.2.weight"] @ inner + p["network.2.bias"]


def gate_of(linear, h):
    logit = linear.weight.detach().double().numpy() @ h
    return np.exp(logit) / np.exp(logit).sum()


@pytest.mark.parametrize(("residual", "width"), [(False, 5), (True, 5), (True, 6)])
def test_mmoe_equals_the_papers_formula(residual, width):
    torch.manual_seed(0)
    head, state = MMoE(Layout((width,)), options(residual=residual), TASKS), torch.randn(8, width)
    actual = {task: mix.detach().numpy() for task, mix in head(state).items()}
    for row, h in enumerate(state.double().numpy()):
        for task in TASKS:
            gate = gate_of(head.gates[task], h)
            mix = sum(share * expert_by_hand(network, h) for share, network in zip(gate, head.experts, strict=True))
            assert actual[task][row] == pytest.approx(mix, abs=1e-5)


def test_each_encoders_state_feeds_its_own_experts_and_gates_see_all():
    torch.manual_seed(0)
    head, state = MMoE(Layout((2, 3), shared=1), options(experts=4, residual=False), TASKS), torch.randn(8, 6)
    assert [network[0].in_features for network in head.experts] == [3, 3, 4, 4]
    actual = {task: mix.detach().numpy() for task, mix in head(state).items()}
    for row, h in enumerate(state.double().numpy()):
        views = [h[[0, 1, 5]], h[[0, 1, 5]], h[[2, 3, 4, 5]], h[[2, 3, 4, 5]]]
        outputs = [expert_by_hand(network, view) for network, view in zip(head.experts, views, strict=True)]
        for task in TASKS:
            gate = gate_of(head.gates[task], h)
            mix = sum(share * output for share, output in zip(gate, outputs, strict=True))
            assert actual[task][row] == pytest.approx(mix, abs=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_ple_equals_the_papers_formula_over_two_levels(residual):
    """Tang et al. 2020, equations 1 to 5: a task's gate weighs its own and the shared experts."""
    torch.manual_seed(0)
    head = PLE(Layout((5,)), options(shared_experts=2, task_experts=2, levels=2, residual=residual), TASKS)
    state = torch.randn(4, 5)
    actual, gates = head(state), head.gate_weights(state)
    for row, h in enumerate(state.double().numpy()):
        inputs = dict.fromkeys([*TASKS, "shared"], h)
        for level in head.levels:
            outputs = {group: [expert_by_hand(e, inputs[group]) for e in level.experts[group]] for group in inputs}
            shared = outputs["shared"]
            used = {task: outputs[task] + shared for task in TASKS}
            used["shared"] = [e for task in TASKS for e in outputs[task]] + shared
            shares = {group: gate_of(gate, inputs[group]) for group, gate in level.gates.items()}
            inputs = {
                group: sum(share * output for share, output in zip(shares[group], used[group], strict=True))
                for group in shares
            }
        assert set(inputs) == set(TASKS)  # the last level has no shared gate
        for task in TASKS:
            assert actual[task][row].detach().numpy() == pytest.approx(inputs[task], abs=1e-5)
            assert gates[task][row].detach().numpy() == pytest.approx(shares[task], abs=1e-5)


@pytest.mark.parametrize("model", list(RANK_HEADS))
def test_rankers_equal_the_papers_formula(model):
    """Every logit by hand from the features; ESMM (Ma et al. 2018): p(task, click) = p(click) p(task | click)."""
    torch.manual_seed(0)
    categories = torch.tensor([0, 2, 1, 0, 2])
    ranker = Ranker(config(model=model, tasks=["click", "like", "share"]), categories).eval()
    tables = {"user": torch.randn(4, 6), "item": torch.randn(5, 6)}
    user, item = torch.tensor([1, 3]), torch.tensor([4, 2])
    history = torch.tensor([[0, 0, 1, 3], [0, 0, 0, 0]])
    profile = torch.tensor([[1, 3], [-1, 2]])
    vectors = tables["user"][user], tables["item"][item], tables["item"][history]
    feature = ranker.features(*vectors, item, history, profile)
    p = weights(ranker)
    for row in range(2):
        clicked = [tables["item"][i].numpy() for i in history[row].tolist() if i]
        codes = [code + 1 if code >= 0 else 0 for code in profile[row].tolist()]
        expected = np.concatenate(
            [
                vectors[0][row],
                vectors[1][row],
                np.mean(clicked, axis=0) if clicked else np.zeros(6),
                p["category.weight"][categories[item[row]]],
                np.mean(
                    [p["category.weight"][categories[i]] for i in history[row].tolist() if i] or np.zeros((1, 16)),
                    axis=0,
                ),
                *(p[f"profile.embeddings.{i}.weight"][code] for i, code in enumerate(codes)),
            ]
        )
        assert feature[row].detach().numpy() == pytest.approx(expected, abs=1e-5)
    task_representations = {task: mix.detach().double().numpy() for task, mix in ranker.head(feature).items()}
    actual = {task: sigmoid(logit.detach().numpy()) for task, logit in ranker.logits(feature).items()}
    own = {}
    for task in ranker.feedback_tasks:
        hidden = np.maximum(task_representations[task] @ p[f"towers.{task}.0.weight"].T + p[f"towers.{task}.0.bias"], 0)
        own[task] = sigmoid(hidden @ p[f"towers.{task}.2.weight"].T + p[f"towers.{task}.2.bias"])[:, 0]
    for task, probability in own.items():
        given_click = model == "rank_esmm" and task != "click"
        assert actual[task] == pytest.approx(probability * (own["click"] if given_click else 1.0), abs=1e-5)


@given(st.floats(-40, 40), st.floats(-40, 40))
@settings(deadline=None)
def test_the_logit_of_a_product_is_finite_and_right(first, second):
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (first, second))
    actual = product_logit(a, b)
    actual.backward()
    assert np.isfinite([actual.item(), a.grad.item(), b.grad.item()]).all()
    expected = sigmoid(first) * sigmoid(second)
    assert sigmoid(actual.item()) == pytest.approx(expected, rel=1e-6, abs=2e-7)


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("encoder", MODELS, ids=str)
def test_padding_batch_composition_and_order_change_no_state(encoder, head):
    torch.manual_seed(0)
    model = Recommender(config(encoder=encoder, head=head)).eval()
    table, profile = torch.randn(5, 6), torch.zeros(5, 2, dtype=torch.long)
    table[0] = 0.0
    items = torch.randint(1, 5, (5, 9))
    items[2, 4:] = 0

    def states(items, profile):
        return model.states(items, table[items], profile, every_place(items)).view(*items.shape, -1)

    whole = states(items, profile)
    assert torch.allclose(whole[2, :4], states(items[2:3, :4], profile[2:3])[0], atol=1e-5)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(whole[order], states(items[order], profile), atol=1e-5)
    task_representations, alone = (
        model.task_representations(whole.flatten(0, 1)),
        model.task_representations(whole[2, :3]),
    )
    for task in TASKS:
        assert torch.allclose(task_representations[task].view(5, 9, -1)[2, :3], alone[task], atol=1e-5)


@pytest.mark.parametrize("encoder", MODELS, ids=str)
def test_a_later_click_changes_no_earlier_state(encoder):
    torch.manual_seed(0)
    model = Recommender(config(encoder=encoder)).eval()
    table, profile = torch.randn(7, 6), torch.zeros(1, 2, dtype=torch.long)
    items = torch.tensor([[1, 2, 1, 3, 4, 2]])
    changed = torch.tensor([[1, 2, 1, 3, 6, 2]])
    before, after = (model.states(each, table[each], profile, every_place(each)) for each in (items, changed))
    assert torch.allclose(before[:4], after[:4], atol=1e-6)
    assert not torch.allclose(before[4:], after[4:], atol=1e-3)


def test_profile_joins_the_state_and_unknown_codes_share_one_vector():
    torch.manual_seed(0)
    model = Recommender(config(options(profile=True), encoder=["gru4rec", "sasrec"])).eval()
    items = torch.ones(4, 2, dtype=torch.long)
    profile = torch.tensor([[1, 3], [-1, -1], [99, -1], [2, 3]])
    states = model.states(items, torch.zeros(4, 2, 6), profile, torch.tensor([1, 3, 5, 7]))
    assert states.shape == (4, 5 + 5 + 8)
    assert torch.allclose(states[1], states[2])
    assert not torch.allclose(states[0], states[3])


def test_feedback_towers_begin_at_the_rate_of_their_task():
    settings = config()
    settings.train.positive_rates = {"click": 0.7, "like": 0.02}
    model = Recommender(settings)
    for task, rate in settings.train.positive_rates.items():
        assert sigmoid(model.towers[task].network[-1].bias.item()) == pytest.approx(rate, rel=1e-5)


def test_flops_count_two_for_each_weight_and_candidate():
    parts = Recommender(config()).flops(candidates=100, embedding_dim=6, clicks=7)
    assert parts["encoder gru4rec"] == 2 * 3 * (5 * 6 + 5 * 5)
    assert parts["head"] == 2 * (3 * (5 * 6 + 5 * 6 + 6 * 6) + 3 * 5 * 3)
    assert parts["next tower"] == 2 * (6 * 4 + 4 * 6)
    assert parts["feedback towers"] == 2 * 2 * (18 * 4 + 4)
    assert parts["next scores"] == 2 * 100 * 6


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = Recommender(config(options(levels=1), encoder="sasrec", head="ple")).eval()
    items = torch.ones(1, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        state = model.states(items, torch.randn(1, 8, 6), torch.zeros(1, 2, dtype=torch.long), every_place(items))
        model.query(model.task_representations(state)["next"])
    parts = model.flops(candidates=0, embedding_dim=6, clicks=0)  # the counter does not look into attention
    mixing = len(TASKS) * 2 * (4 + 1) * 6  # shares × outputs, which the count by weights leaves out
    message = 8 * (parts["encoder sasrec"] + parts["head"] + parts["next tower"] + mixing)
    assert counter.get_total_flops() == message
