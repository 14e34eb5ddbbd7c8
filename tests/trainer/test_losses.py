"""Losses against torch's own operators, and the sampled softmax against the full one in expectation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import losses
from trainer.losses import accidental_hits, softmax_sum
from trainer.negatives import NegativeSampler


def random_problem(seed, n=7, items=12, dimension=4):
    generator = torch.Generator().manual_seed(seed)
    query, vector = torch.randn(n, dimension, generator=generator), torch.randn(items, dimension, generator=generator)
    bias, target = torch.randn(items, generator=generator), torch.randint(0, items, (n,), generator=generator)
    return [t.requires_grad_() if t.is_floating_point() else t for t in (query, vector, bias, target)]


@pytest.mark.parametrize("chunk", [1, 25, 1 << 22])
def test_with_all_items_it_is_torchs_cross_entropy_with_its_gradients(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SCORES", chunk)
    query, vector, bias, target = random_problem(0)
    ids = torch.arange(len(vector))
    ours = softmax_sum(query, vector[target], bias[target], vector, bias, target, ids)
    found = torch.autograd.grad(ours * 0.7, (query, vector, bias))
    theirs = torch.nn.functional.cross_entropy(query @ vector.t() + bias, target, reduction="sum")
    wanted = torch.autograd.grad(theirs * 0.7, (query, vector, bias))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.lists(st.integers(1, 6), min_size=1, max_size=12))
@settings(deadline=None)
def test_accidental_hits_are_all_pairs_of_equal_ids(targets, candidates):
    row, column = accidental_hits(torch.tensor(targets), torch.tensor(candidates))
    wanted = {(i, j) for i, t in enumerate(targets) for j, c in enumerate(candidates) if t == c}
    assert set(zip(row.tolist(), column.tolist(), strict=True)) == wanted
    assert len(row) == len(wanted)


def test_a_sampled_target_does_not_compete_with_itself():
    query, vector, bias, _ = random_problem(1, n=1)
    target = torch.tensor([3])
    with_hit = softmax_sum(
        query, vector[target], bias[target], vector[[3, 5, 3]], bias[[3, 5, 3]], target, torch.tensor([3, 5, 3])
    )
    without = softmax_sum(query, vector[target], bias[target], vector[[5]], bias[[5]], target, torch.tensor([5]))
    assert with_hit.item() == pytest.approx(without.item(), rel=1e-6)


def test_the_corrected_sample_estimates_the_full_normaliser_without_bias():
    """The mean over draws of Σ exp(s − log K q) over non-targets is Σ exp(s) over all other items."""
    rng = np.random.default_rng(0)
    clicks, scores = rng.integers(0, 50, 30), rng.normal(size=30)
    sampler = NegativeSampler(clicks, alpha=0.6, uniform=0.2)
    k, draws, target = 40, 4000, 7
    estimates = []
    for step in range(draws):
        ids = sampler.draw(k, seed=0, step=step)
        weight = np.exp(scores[ids - 1] - sampler.log_q(ids) - np.log(k))
        estimates.append(weight[ids != target].sum())
    wanted = np.exp(scores).sum() - np.exp(scores[target - 1])
    error = np.std(estimates) / np.sqrt(draws)
    assert abs(np.mean(estimates) - wanted) < 4 * error
    assert error < 0.01 * wanted


def test_the_expected_sampled_gradient_nears_the_full_one_as_samples_grow():
    query, vector, bias, target = random_problem(2, n=5, items=30)
    ids = torch.arange(1, 31)
    full = softmax_sum(query, vector[target], bias[target], vector, bias, target + 1, ids)
    wanted = torch.autograd.grad(full, query)[0]
    sampler = NegativeSampler(np.arange(30), alpha=0.5, uniform=0.3)
    distance = []
    for k in (20, 2000):
        total = torch.zeros_like(wanted)
        for step in range(200):
            drawn = sampler.draw(k, seed=1, step=step)
            place = torch.from_numpy(drawn - 1)
            correction = -torch.from_numpy(sampler.log_q(drawn)) - np.log(k)
            loss = softmax_sum(
                query,
                vector[target],
                bias[target],
                vector[place],
                bias[place] + correction,
                target + 1,
                torch.from_numpy(drawn),
            )
            total += torch.autograd.grad(loss, query)[0]
        distance.append(float((total / 200 - wanted).norm() / wanted.norm()))
    assert distance[1] < 0.01
    assert distance[1] < distance[0]


def test_draws_follow_the_stated_probabilities_and_only_the_step_decides_them():
    from scipy.stats import chisquare

    clicks = np.array([0, 1, 10, 100, 5])
    sampler = NegativeSampler(clicks, alpha=0.75, uniform=0.25)
    drawn = sampler.draw(200_000, seed=3, step=9)
    powered = np.where(clicks > 0, clicks**0.75, 0.0)
    wanted = 0.75 * powered / powered.sum() + 0.25 / 5
    assert np.exp(sampler.log_q(np.arange(1, 6))) == pytest.approx(wanted, rel=1e-5)
    assert chisquare(np.bincount(drawn, minlength=6)[1:], wanted * len(drawn)).pvalue > 1e-3
    assert np.array_equal(drawn, sampler.draw(200_000, seed=3, step=9))
    assert not np.array_equal(drawn[:50], sampler.draw(50, seed=3, step=10))
