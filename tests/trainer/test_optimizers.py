"""Optimisers of tables and networks against formulas and torch.optim; learning-rate schedules."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from trainer.models.embedding_table import SparseTable
from trainer.option_groups import TrainOptions
from trainer.training.optimizers import Adagrad, AdamW
from trainer.training.step import learning_rate_factor


def test_rowwise_adagrad_equals_the_formula(device):
    table = SparseTable(5, 3, generator=torch.Generator().manual_seed(0), device=device)
    vector, bias = table.vector.cpu().double().numpy().copy(), np.zeros(6)
    square, bias_square = np.zeros(6), np.zeros(6)
    rng = np.random.default_rng(0)
    for _ in range(4):
        ids, gradient = np.sort(rng.choice(np.arange(1, 6), 3, replace=False)), rng.normal(size=(3, 4))
        table.update(torch.from_numpy(ids).to(device), torch.from_numpy(gradient).float().to(device), 0.1)
        for row, g in zip(ids, gradient, strict=True):
            square[row] += np.mean(g[:3] ** 2)
            vector[row] -= 0.1 * g[:3] / (np.sqrt(square[row]) + 1e-6)
            bias_square[row] += g[3] ** 2
            bias[row] -= 0.1 * g[3] / (np.sqrt(bias_square[row]) + 1e-6)
    assert table.vector.cpu().numpy() == pytest.approx(vector, abs=1e-5)
    assert table.bias.cpu().numpy() == pytest.approx(bias, abs=1e-5)


def test_full_adagrad_equals_torch_on_the_same_rows(device):
    table = SparseTable(5, 3, generator=torch.Generator().manual_seed(0), device=device, bias=False, rowwise=False)
    theirs = torch.nn.Parameter(table.vector.clone())
    optimizer = torch.optim.Adagrad([theirs], lr=0.1, eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    for ids in ([1, 3], [2, 3, 5], [1, 2, 3, 4, 5]):
        gradient, rows = torch.randn(len(ids), 3, generator=generator).to(device), torch.tensor(ids, device=device)
        theirs.grad = torch.zeros_like(theirs).index_copy(0, rows, gradient)
        optimizer.step()
        table.update(rows, gradient, 0.1)
    assert torch.allclose(table.vector, theirs, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(Adagrad, partial(torch.optim.Adagrad, eps=1e-6)), (AdamW, partial(torch.optim.AdamW, foreach=False))],
)
def test_network_optimisers_are_bit_identical_to_torch_on_a_cpu(ours, theirs, decay, device):
    generator = torch.Generator().manual_seed(2)
    start = [torch.randn(shape, generator=generator).to(device) for shape in ((3, 4), (5,), (2,))]
    left, right = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    rates = [0.05, 0.02, 0.05]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(right, rates, strict=True)]
    mine = ours(dict(zip(left, rates, strict=True)), weight_decay=decay)
    reference = theirs(groups, weight_decay=decay)
    for number, factor in enumerate((1.0, 0.5, 0.25, 1.0), 1):
        for a, b in zip(left[:2], right[:2], strict=True):  # the third never gets a gradient
            a.grad = torch.randn(a.shape, generator=generator).to(device)
            b.grad = a.grad.clone()
        for group, rate in zip(reference.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        reference.step()
        mine.step(number, factor)
        for a, b in zip(left, right, strict=True):
            assert torch.equal(a, b) if device.type == "cpu" else torch.allclose(a, b, rtol=1e-6)
    assert torch.equal(left[2], start[2])


def test_weight_decay_applies_only_to_updated_rows(device):
    table = SparseTable(4, 3, generator=torch.Generator().manual_seed(0), device=device)
    before = table.vector.clone()
    table.update(torch.tensor([2], device=device), torch.zeros(1, 4, device=device), 0.01, decay=0.5)
    assert (table.vector[2].abs() < before[2].abs()).all()
    assert torch.equal(table.vector[[1, 3, 4]], before[[1, 3, 4]])


def test_learning_rate_follows_warmup_and_cosine_schedule():
    options = TrainOptions(warmup_steps=4, schedule="cosine")
    factors = [learning_rate_factor(options, step, 24) for step in range(26)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[14] == pytest.approx(0.5)
    assert factors[24:] == pytest.approx([0.0, 0.0])
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))
    assert learning_rate_factor(TrainOptions(), 10**6, 5) == 1.0
