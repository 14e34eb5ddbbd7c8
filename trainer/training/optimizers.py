"""Adagrad and AdamW for the networks, bit-identical to `torch.optim` on a CPU.

Creating a torch optimiser imports torch's compiler, which takes longer than an epoch on a small dataset.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class Adagrad:
    """Adagrad (Duchi et al. 2011) with L2 weight decay.

    Args:
        rates: learning rate of each parameter; parameters without a gradient are not updated.
        weight_decay: × the parameter, added to its gradient.
        eps: added to the root of the accumulator.
    """

    def __init__(self, rates: Mapping[nn.Parameter, float], *, weight_decay: float = 0.0, eps: float = 1e-6) -> None:
        self.rates, self.weight_decay, self.eps = dict(rates), weight_decay, eps
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {p: {"sum": torch.zeros_like(p)} for p in rates}
        """State by parameter and name, float32 in the parameter's shape; updated in place."""

    @torch.no_grad()
    def step(self, number: int, factor: float = 1.0) -> None:
        """Update all parameters at `factor` × their learning rates; `number` counts steps from 1."""
        del number
        parameters, gradient, rates = _with_gradient(self.rates, factor)
        if self.weight_decay:
            gradient = list(torch._foreach_add(gradient, parameters, alpha=self.weight_decay))
        total = [self.state[p]["sum"] for p in parameters]
        torch._foreach_addcmul_(total, gradient, gradient)
        root = torch._foreach_sqrt(total)
        torch._foreach_add_(root, self.eps)
        torch._foreach_addcdiv_(parameters, gradient, root, [-rate for rate in rates])


class AdamW:
    """Adam (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019).

    Args:
        rates: learning rate of each parameter; parameters without a gradient are not updated.
        weight_decay: × learning rate × the parameter, subtracted in each step.
    """

    BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8

    def __init__(self, rates: Mapping[nn.Parameter, float], *, weight_decay: float = 0.0) -> None:
        self.rates, self.weight_decay = dict(rates), weight_decay
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {
            p: {n: torch.zeros_like(p) for n in ("exp_avg", "exp_avg_sq")} for p in rates
        }
        """State by parameter and name, float32 in the parameter's shape; updated in place."""

    @torch.no_grad()
    def step(self, number: int, factor: float = 1.0) -> None:
        """Update all parameters at `factor` × their learning rates; `number` counts steps from 1."""
        parameters, gradient, rates = _with_gradient(self.rates, factor)
        mean, square = ([self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_mul_(parameters, [1.0 - rate * self.weight_decay for rate in rates])
        torch._foreach_lerp_(mean, gradient, 1.0 - self.BETA_1)
        torch._foreach_mul_(square, self.BETA_2)
        torch._foreach_addcmul_(square, gradient, gradient, value=1.0 - self.BETA_2)
        root = torch._foreach_sqrt(square)
        torch._foreach_div_(root, (1.0 - self.BETA_2**number) ** 0.5)
        torch._foreach_add_(root, self.EPS)
        correction = 1.0 - self.BETA_1**number
        torch._foreach_addcdiv_(parameters, mean, root, [-rate / correction for rate in rates])


def _with_gradient(
    rates: Mapping[nn.Parameter, float], factor: float
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Parameters that have a gradient, the gradients, and the learning rates × `factor`."""
    trained = [(p, p.grad, rate * factor) for p, rate in rates.items() if p.grad is not None]
    return [p for p, _, _ in trained], [gradient for _, gradient, _ in trained], [rate for _, _, rate in trained]
