"""Losses against torch's own operators, and the sampled softmax against the full one in expectation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.training import losses
from trainer.training.losses import accidental_hits, fused_sum, softmax_kernel
from trainer.training.negatives import NegativeSampler


def random_problem(seed, n=7, items=12, dimension=4, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    query, vector = torch.randn(n, dimension, generator=generator), torch.randn(items, dimension, generator=generator)
    bias, target = torch.randn(items, generator=generator), torch.randint(0, items, (n,), generator=generator)
    tensors = [t.to(device) for t in (query, vector, bias, target)]
    return [t.requires_grad_() if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("chunk", [1, 25, 1 << 22])
def test_softmax_over_all_items_equals_torchs_cross_entropy_and_gradients(chunk, device, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SCORES", chunk)
    query, vector, bias, target = random_problem(0, device=device)
    ids = torch.arange(len(vector), device=device)
    ours = fused_sum(softmax_kernel, query, vector[target], bias[target], vector, bias, target, ids)
    actual = torch.autograd.grad(ours * 0.7, (query, vector, bias))
    theirs = torch.nn.functional.cross_entropy(query @ vector.t() + bias, target, reduction="sum")
    expected = torch.autograd.grad(theirs * 0.7, (query, vector, bias))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.lists(st.integers(1, 6), min_size=1, max_size=12))
def test_accidental_hits_are_all_pairs_of_equal_ids(targets, candidates):
    row, column = accidental_hits(torch.tensor(targets), torch.tensor(candidates))
    expected = {(i, j) for i, t in enumerate(targets) for j, c in enumerate(candidates) if t == c}
    assert set(zip(row.tolist(), column.tolist(), strict=True)) == expected
    assert len(row) == len(expected)


def test_a_sampled_target_does_not_compete_with_itself():
    query, vector, bias, _ = random_problem(1, n=1)
    target = torch.tensor([3])
    with_hit = fused_sum(
        softmax_kernel,
        query,
        vector[target],
        bias[target],
        vector[[3, 5, 3]],
        bias[[3, 5, 3]],
        target,
        torch.tensor([3, 5, 3]),
    )
    without = fused_sum(
        softmax_kernel, query, vector[target], bias[target], vector[[5]], bias[[5]], target, torch.tensor([5])
    )
    assert with_hit.item() == pytest.approx(without.item(), rel=1e-6)


def test_corrected_samples_estimate_the_full_normaliser_without_bias():
    """The mean over draws of Σ exp(s − log K q) over non-targets is Σ exp(s) over all other items."""
    rng = np.random.default_rng(0)
    clicks, scores = rng.integers(0, 50, 30), rng.normal(size=30)
    sampler = NegativeSampler(clicks, popularity_exponent=0.6, uniform_share=0.2)
    k, draws, target = 40, 4000, 7
    estimates = []
    for step in range(draws):
        ids = sampler.draw(k, seed=0, step=step)
        weight = np.exp(scores[ids - 1] - sampler.log_q(ids) - np.log(k))
        estimates.append(weight[ids != target].sum())
    expected = np.exp(scores).sum() - np.exp(scores[target - 1])
    error = np.std(estimates) / np.sqrt(draws)
    assert abs(np.mean(estimates) - expected) < 4 * error
    assert error < 0.01 * expected


def test_expected_sampled_gradient_converges_to_the_full_gradient():
    query, vector, bias, target = random_problem(2, n=5, items=30)
    ids = torch.arange(1, 31)
    full = fused_sum(softmax_kernel, query, vector[target], bias[target], vector, bias, target + 1, ids)
    expected = torch.autograd.grad(full, query)[0]
    sampler = NegativeSampler(np.arange(30), popularity_exponent=0.5, uniform_share=0.3)
    distance = []
    for k in (20, 2000):
        total = torch.zeros_like(expected)
        for step in range(200):
            drawn = sampler.draw(k, seed=1, step=step)
            index = torch.from_numpy(drawn - 1)
            correction = -torch.from_numpy(sampler.log_q(drawn)) - np.log(k)
            loss = fused_sum(
                softmax_kernel,
                query,
                vector[target],
                bias[target],
                vector[index],
                bias[index] + correction,
                target + 1,
                torch.from_numpy(drawn),
            )
            total += torch.autograd.grad(loss, query)[0]
        distance.append(float((total / 200 - expected).norm() / expected.norm()))
    assert distance[1] < 0.01
    assert distance[1] < distance[0]


@pytest.mark.parametrize("exponent", [0.0, 0.75])
def test_negatives_follow_the_stated_probabilities_and_depend_on_the_step(exponent):
    from scipy.stats import chisquare

    clicks = np.array([0, 1, 10, 100, 5])
    sampler = NegativeSampler(clicks, popularity_exponent=exponent, uniform_share=0.25)
    drawn = sampler.draw(200_000, seed=3, step=9)
    powered = np.where(clicks > 0, clicks**exponent, 0.0)
    expected = 0.75 * powered / powered.sum() + 0.25 / 5
    assert np.exp(sampler.log_q(np.arange(1, 6))) == pytest.approx(expected, rel=1e-5)
    assert chisquare(np.bincount(drawn, minlength=6)[1:], expected * len(drawn)).pvalue > 1e-3
    assert np.array_equal(drawn, sampler.draw(200_000, seed=3, step=9))
    assert not np.array_equal(drawn[:50], sampler.draw(50, seed=3, step=10))
    assert not np.array_equal(drawn[:50], sampler.draw(50, seed=4, step=9))


def test_probabilities_of_many_clicks_and_of_items_that_are_not_drawn():
    """More clicks than 32 bits hold. An item new in a refit's clicks is as probable as the least of the others."""
    sampler = NegativeSampler(
        np.array([3 << 31, 0, 1 << 31]), popularity_exponent=1.0, uniform_share=0.0, clicked_only=True
    )
    assert np.exp(sampler.log_q(np.array([1, 2, 3]))) == pytest.approx([0.75, 0.25, 0.25], rel=1e-5)
    assert sampler.items.tolist() == [1, 3]


def scores_of(seed: int, n: int = 6, k: int = 9) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Target scores `[N]`, candidate scores `[N, K]` with some hits masked, and which candidates count."""
    rng = np.random.default_rng(seed)
    own, score = rng.normal(size=n), rng.normal(size=(n, k)) * 2
    present = rng.random((n, k)) > 0.2
    present[:, 0] = True
    score = np.where(present, score, losses.MASKED_SCORE)
    return torch.tensor(own, requires_grad=True), torch.tensor(score, requires_grad=True), present


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pairwise_by_hand(name: str, own: float, negatives: np.ndarray) -> float:
    """One example's loss by the papers' formulas."""
    if name == "bpr":
        return float(np.mean([-np.log(sigmoid(own - s)) for s in negatives]))
    if name == "top1":
        return float(np.mean([sigmoid(s - own) + sigmoid(s**2) for s in negatives]))
    if name == "bpr_max":
        share = np.exp(negatives) / np.exp(negatives).sum()
        reward = sum(p * sigmoid(own - s) for p, s in zip(share, negatives, strict=True))
        return float(-np.log(reward) + 0.7 * sum(p * s**2 for p, s in zip(share, negatives, strict=True)))
    if name == "gbce":
        rate, t = 0.04, 0.6
        beta = rate * (t * (1 - 1 / rate) + 1 / rate)
        positive = np.log(sigmoid(own) ** beta)
        return float(-(positive + sum(np.log(1 - sigmoid(s)) for s in negatives)) / (len(negatives) + 1))
    return float(-np.log(np.exp(own) / (np.exp(own) + np.exp(negatives).sum())))


LOSS_OF_SCORES = {
    "bpr": losses.bpr_sum,
    "top1": losses.top1_sum,
    "bpr_max": lambda own, score: losses.bpr_max_sum(own, score, 0.7),
    "gbce": lambda own, score: losses.gbce_sum(own, score, sampling_rate=0.04, t=0.6),
    "softmax": losses.softmax_of_scores,
}


@pytest.mark.parametrize("name", list(LOSS_OF_SCORES))
@pytest.mark.parametrize("seed", range(5))
def test_pairwise_losses_equal_the_papers_formulas_and_ignore_hits(name, seed):
    own, score, present = scores_of(seed)
    actual = LOSS_OF_SCORES[name](own, score)
    rows = zip(own.detach().numpy(), score.detach().numpy(), present, strict=True)
    expected = sum(pairwise_by_hand(name, o, s[p]) for o, s, p in rows)
    assert actual.item() == pytest.approx(expected, rel=1e-6)
    actual.backward()
    assert torch.isfinite(own.grad).all()
    assert torch.isfinite(score.grad).all()
    assert not score.grad[~torch.from_numpy(present)].any()


KERNELS = {
    "softmax": softmax_kernel,
    "bpr_max": losses.bpr_max_kernel(0.7),
    "bpr": losses.kernel_of(losses.bpr_sum),
    "top1": losses.kernel_of(losses.top1_sum),
    "gbce": losses.kernel_of(LOSS_OF_SCORES["gbce"]),
}


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("chunk", [1, 30, 1 << 20])
def test_fused_losses_and_gradients_equal_those_of_the_full_score_matrix(name, chunk, device, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SCORES", chunk)
    query, vector, bias, target = random_problem(5, device=device)
    ids = torch.tensor([0, 3, 3, 7, 11, 2, 9], device=device)
    options = (query, vector[target], bias[target], vector[ids], bias[ids], target, ids)
    actual = fused_sum(KERNELS[name], *options)
    own = (query * vector[target]).sum(1) + bias[target]
    expected = LOSS_OF_SCORES[name](own, losses.candidate_scores(query, vector[ids], bias[ids], target, ids))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(0.3 * loss, (query, vector, bias)) for loss in (actual, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_bpr_max_is_finite_if_the_targets_chance_against_each_negative_rounds_to_zero():
    loss, *gradients = losses.bpr_max_kernel(0.0)(torch.tensor([[100.0, 90.0]]), torch.tensor([-100.0]))
    assert loss.item() == pytest.approx(-np.log(1e-24), rel=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", list(KERNELS))
def test_losses_are_finite_if_every_drawn_negative_is_the_target(name):
    """A catalogue of one item, or a step that drew only the target: BPR-max once squared the score of the hit."""
    query, vector, bias, _ = random_problem(2)
    ids = torch.full((4,), 3)
    target = torch.full((len(query),), 3)
    actual = fused_sum(KERNELS[name], query, vector[target], bias[target], vector[ids], bias[ids], target, ids)
    own = (query * vector[target]).sum(1) + bias[target]
    hits = torch.full((len(query), 4), losses.MASKED_SCORE)
    assert actual.item() == pytest.approx(LOSS_OF_SCORES[name](own, hits).item(), rel=1e-5, abs=1e-6)
    gradients = torch.autograd.grad(actual, (query, vector, bias))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if name != "gbce":  # gbce also has a term of the target alone
        assert actual.item() == 0
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", list(LOSS_OF_SCORES))
def test_loss_gradients_match_finite_differences(name):
    own, score, present = scores_of(9, n=3, k=4)
    counted = torch.from_numpy(present)

    def loss(own, values):
        return LOSS_OF_SCORES[name](own, torch.full_like(score, losses.MASKED_SCORE).masked_scatter(counted, values))

    assert torch.autograd.gradcheck(loss, (own, score.detach()[counted].requires_grad_()))


def test_gbce_with_all_negatives_or_t_0_is_plain_binary_cross_entropy():
    own, score, _ = scores_of(3)
    plain = losses.gbce_sum(own, score, sampling_rate=1.0, t=0.9)
    assert losses.gbce_sum(own, score, sampling_rate=0.1, t=0.0).item() == pytest.approx(plain.item())


def test_embedding_loss_moves_queries_towards_targets_and_not_the_targets():
    query, target = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    loss = losses.embedding_sum(query, target)
    q, t = query.detach().numpy(), target.detach().numpy()
    cosine = (q * t).sum(1) / np.linalg.norm(q, axis=1) / np.linalg.norm(t, axis=1)
    assert loss.item() == pytest.approx(float((1 - cosine).sum()), rel=1e-5)
    loss.backward()
    assert target.grad is None
    assert losses.embedding_sum(query - 0.1 * query.grad, target).item() < loss.item()


def test_batch_positives_with_drawn_negatives_estimate_the_full_normaliser():
    """Candidates from two sources: each is weighted by 1 / its expected count, so the sum is unbiased."""
    rng = np.random.default_rng(1)
    clicks, scores = rng.integers(0, 50, 30), rng.normal(size=30)
    sampler = NegativeSampler(clicks, popularity_exponent=0.5, uniform_share=0.3)
    estimates = []
    for step in range(4000):
        drawn = sampler.draw(20, seed=0, step=step)
        positives = rng.choice(30, 15, p=clicks / clicks.sum()) + 1
        ids = np.concatenate([drawn, positives])
        estimates.append(np.exp(scores[ids - 1] - sampler.log_expected(ids, drawn=20, positives=15)).sum())
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - np.exp(scores).sum()) < 4 * error
    assert error < 0.01 * np.exp(scores).sum()


def test_candidate_scores_are_inner_products_with_hits_masked():
    query, vector, bias, target = random_problem(4)
    ids = torch.tensor([2, 5, 2, 7, 11])
    actual = losses.candidate_scores(query, vector[ids], bias[ids], target, ids)
    for n in range(len(query)):
        for k, item in enumerate(ids.tolist()):
            expected = (query[n] @ vector[item] + bias[item]).item()
            assert actual[n, k].item() == pytest.approx(
                losses.MASKED_SCORE if item == target[n] else expected, rel=1e-5
            )


@pytest.mark.parametrize("name", ["softmax", "bpr_max", "bpr"])
@pytest.mark.parametrize("k", [0, 1, 3, 7, 50])
def test_hard_negatives_are_the_k_highest_scored_candidates_of_a_target(name, k):
    query, vector, bias, target = random_problem(6)
    ids = torch.tensor([0, 3, 5, 7, 11, 2, 9])
    options = (query, vector[target], bias[target], vector[ids], bias[ids], target, ids)
    actual = fused_sum(losses.hard_kernel(KERNELS[name], k), *options)
    own = (query * vector[target]).sum(1) + bias[target]
    score = losses.candidate_scores(query, vector[ids], bias[ids], target, ids)
    expected = torch.zeros(())
    for n in range(len(query)):
        hardest = score[n][score[n] > losses.MASKED_SCORE / 2].sort(descending=True).values[: k or None]
        expected = expected + LOSS_OF_SCORES[name](own[n : n + 1], hardest[None])
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(loss, (query, vector, bias)) for loss in (actual, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 3.5])
def test_weighted_feedback_equals_repeated_positives(weight):
    logit, label = torch.randn(20), torch.randint(0, 2, (20,)).float()
    actual = losses.feedback_sum(logit, label, weight).item()
    rows = torch.nn.functional.binary_cross_entropy_with_logits(logit, label, reduction="none")
    assert actual == pytest.approx(float(rows[label == 0].sum() + weight * rows[label == 1].sum()), rel=1e-5)
