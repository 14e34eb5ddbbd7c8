"""Heads, rankers and the recommender against the papers' formulas in NumPy, one example at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.small_models import TASKS, config, every_place, options, sigmoid, weights
from trainer.config import ENCODERS, RANK_HEADS
from trainer.models.heads import HEAD_CLASSES, PLE, Layout, MMoE
from trainer.models.ranker import Ranker, product_logit
from trainer.models.recommender import Recommender
from trainer.models.sasrec import LENGTH_STEP

MODELS = [*ENCODERS, ["gru4rec", "srgnn"], ["sasrec", "gru4rec", "srgnn"]]


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


@pytest.mark.parametrize("head", sorted(HEAD_CLASSES))
def test_initial_query_of_a_hybrid_is_close_to_its_encoder_state(head):
    torch.manual_seed(0)
    model = Recommender(config(options(embedding_dim=5, levels=2), head=head)).eval()
    state = torch.randn(40, 5)
    change = model.query(model.task_representations(state)["next"]) - state
    assert 0 < change.norm() < 0.25 * state.norm()


def test_experts_read_one_encoders_state_and_gates_read_all_states():
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
    """Every logit computed from the features; ESMM (Ma et al. 2018): p(task, click) = p(click) p(task | click)."""
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
def test_product_logit_is_finite_and_correct(first, second):
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (first, second))
    actual = product_logit(a, b)
    actual.backward()
    assert np.isfinite([actual.item(), a.grad.item(), b.grad.item()]).all()
    expected = sigmoid(first) * sigmoid(second)
    assert sigmoid(actual.item()) == pytest.approx(expected, rel=1e-6, abs=2e-7)


@pytest.mark.parametrize("head", list(HEAD_CLASSES))
@pytest.mark.parametrize("encoder", MODELS, ids=str)
def test_states_do_not_depend_on_padding_batch_composition_or_order(encoder, head):
    torch.manual_seed(0)
    model = Recommender(config(encoder=encoder, head=head)).eval()
    table, profile = torch.randn(5, 6), torch.zeros(5, 2, dtype=torch.long)
    table[0] = 0.0
    items = torch.randint(1, 5, (5, 9))
    items[2, 4:] = 0

    def states(items, profile):
        return model.states(items, table[items], profile, every_place(items)).view(*items.shape, -1)

    together = states(items, profile)
    assert torch.allclose(together[2, :4], states(items[2:3, :4], profile[2:3])[0], atol=1e-5)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(together[order], states(items[order], profile), atol=1e-5)
    task_representations, alone = (
        model.task_representations(together.flatten(0, 1)),
        model.task_representations(together[2, :3]),
    )
    for task in TASKS:
        assert torch.allclose(task_representations[task].view(5, 9, -1)[2, :3], alone[task], atol=1e-5)


@pytest.mark.parametrize("encoder", MODELS, ids=str)
def test_states_do_not_depend_on_later_clicks(encoder):
    torch.manual_seed(0)
    model = Recommender(config(encoder=encoder)).eval()
    table, profile = torch.randn(7, 6), torch.zeros(1, 2, dtype=torch.long)
    items = torch.tensor([[1, 2, 1, 3, 4, 2]])
    changed = torch.tensor([[1, 2, 1, 3, 6, 2]])
    before, after = (model.states(each, table[each], profile, every_place(each)) for each in (items, changed))
    assert torch.allclose(before[:4], after[:4], atol=1e-6)
    assert not torch.allclose(before[4:], after[4:], atol=1e-3)


def test_profile_is_appended_to_the_state_and_unknown_codes_share_a_vector():
    torch.manual_seed(0)
    model = Recommender(config(options(profile=True), encoder=["gru4rec", "sasrec"])).eval()
    items = torch.ones(4, 2, dtype=torch.long)
    profile = torch.tensor([[1, 3], [-1, -1], [99, -1], [2, 3]])
    states = model.states(items, torch.zeros(4, 2, 6), profile, torch.tensor([1, 3, 5, 7]))
    assert states.shape == (4, 5 + 5 + 8)
    assert torch.allclose(states[1], states[2])
    assert not torch.allclose(states[0], states[3])


def test_feedback_towers_are_initialised_to_the_positive_rate_of_their_task():
    settings = config()
    settings.train.positive_rates = {"click": 0.7, "like": 0.02}
    model = Recommender(settings)
    for task, rate in settings.train.positive_rates.items():
        assert sigmoid(model.towers[task].network[-1].bias.item()) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(("model", "like"), [("rank_esmm", 0.3), ("rank_mmoe", 0.06)])
def test_towers_given_a_click_are_initialised_to_the_rate_among_clicks(model, like):
    settings = config(model=model, tasks=["click", "like"])
    settings.train.positive_rates = {"click": 0.2, "like": 0.06}
    towers = Ranker(settings, torch.tensor([0])).towers
    for task, rate in (("click", 0.2), ("like", like)):
        assert sigmoid(towers[task][-1].bias.item()) == pytest.approx(rate, rel=1e-5)


def test_flops_count_two_for_each_weight_and_candidate():
    flops = Recommender(config()).flops(candidates=100, embedding_dim=6, clicks=7)
    assert flops["encoder gru4rec"] == 2 * 3 * (5 * 6 + 5 * 5)
    assert flops["head"] == 2 * (3 * (5 * 6 + 5 * 6 + 6 * 6) + 3 * 5 * 3)
    assert flops["next tower"] == 2 * (6 * 4 + 4 * 6)
    assert flops["feedback towers"] == 2 * 2 * (18 * 4 + 4)
    assert flops["next scores"] == 2 * 100 * 6


def test_flops_equal_torchs_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = Recommender(config(options(levels=1, positions=LENGTH_STEP), encoder="sasrec", head="ple")).eval()
    items = torch.ones(1, LENGTH_STEP, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        state = model.states(
            items, torch.randn(1, LENGTH_STEP, 6), torch.zeros(1, 2, dtype=torch.long), every_place(items)
        )
        model.query(model.task_representations(state)["next"])
    flops = model.flops(candidates=0, embedding_dim=6, clicks=0)  # torch's counter leaves attention out
    mixing = len(TASKS) * 2 * (4 + 1) * 6  # gate weights × expert outputs, which `flops` leaves out
    message = LENGTH_STEP * (flops["encoder sasrec"] + flops["head"] + flops["next tower"] + mixing)
    assert counter.get_total_flops() == message
