"""A GRU layer over complete sessions for training on a CPU, with a hand-written backward pass.

torch's CPU GRU records some twenty autograd operations per click. Here everything that does not depend on the previous
state is one product over all clicks, in the forward and the backward pass.

Letters: T clicks, B sessions, D input, H units. Gates are in torch's order: reset, update, new.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def gru_states(gru: nn.GRU, click_BTD: torch.Tensor) -> torch.Tensor:
    """States `[B, T, H]` of the last layer, starting from zeros: `gru(click_BTD)[0]` up to rounding."""
    state_TBH = click_BTD.transpose(0, 1)
    for layer in range(gru.num_layers):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        state_TBH = _Layer.apply(state_TBH.contiguous(), *(getattr(gru, f"{name}_l{layer}") for name in names))
    return state_TBH.transpose(0, 1)


class _Layer(torch.autograd.Function):
    """One layer in the reset-after form of Cho et al. 2014 that cuDNN and torch use.

    r = σ(x_r + h_r), z = σ(x_z + h_z), n = tanh(x_n + r h_n), h' = n + z (h − n), where x_· and h_· are the thirds of
    W_ih x + b_ih and W_hh h + b_hh.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TBD: torch.Tensor,
        weight_ih: torch.Tensor,
        weight_hh: torch.Tensor,
        bias_ih: torch.Tensor,
        bias_hh: torch.Tensor,
    ) -> torch.Tensor:
        t, b, _ = x_TBD.shape
        h = weight_hh.shape[1]
        of_input = torch.addmm(bias_ih, x_TBD.flatten(0, 1), weight_ih.t()).view(t, b, 3 * h)
        of_state = torch.empty_like(of_input)
        gate = x_TBD.new_empty(t, b, 2 * h)
        new = x_TBD.new_empty(t, b, h)
        state = x_TBD.new_zeros(t + 1, b, h)
        into = weight_hh.t()
        states = state.unbind()
        steps = zip(
            states[:-1],
            states[1:],
            of_state.unbind(),
            *(part.unbind() for part in of_input.split((2 * h, h), dim=2)),
            *(part.unbind() for part in of_state.split((2 * h, h), dim=2)),
            gate.unbind(),
            *(part.unbind() for part in gate.split(h, dim=2)),
            new.unbind(),
            strict=True,
        )
        for before, after, out, x_gate, x_new, h_gate, h_new, gates, reset, update, candidate in steps:
            torch.addmm(bias_hh, before, into, out=out)
            torch.add(x_gate, h_gate, out=gates).sigmoid_()
            torch.addcmul(x_new, reset, h_new, out=candidate).tanh_()
            torch.lerp(candidate, before, update, out=after)
        ctx.save_for_backward(x_TBD, weight_ih, weight_hh, of_state[:, :, 2 * h :], gate, new, state)
        return state[1:]

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x_TBD, weight_ih, weight_hh, state_new, gate, new, state = ctx.saved_tensors
        t, b, h = new.shape
        reset, update = gate[:, :, :h], gate[:, :, h:]
        # Gate gradients are the state's gradient times precomputed factors: only the state's gradient is recurrent.
        by_new = (1.0 - update) * (1.0 - new.square())
        factor = torch.stack(
            [by_new * state_new * reset * (1.0 - reset), (state[:-1] - new) * update * (1.0 - update), by_new * reset],
            dim=2,
        )
        by_state = upstream[0].clone()
        by_gates = torch.empty_like(factor)
        flat = by_gates.view(t * b, 3 * h)
        of_step = (by_state, by_state.unsqueeze(2), factor, by_gates, flat.view(t, b, 3 * h), update)
        steps = list(zip(*(values.unbind() for values in of_step), strict=True))
        for i in range(t - 1, -1, -1):
            own, wide, known, out, gates, keep = steps[i]
            torch.mul(wide, known, out=out)
            if i:
                steps[i - 1][0].addcmul_(own, keep).addmm_(gates, weight_hh)
        by_weight_hh, by_bias_hh = flat.t() @ state[:-1].reshape(t * b, h), flat.sum(0)
        by_gates[:, :, 2] = by_state * by_new
        by_weight_ih, by_bias_ih = flat.t() @ x_TBD.flatten(0, 1), flat.sum(0)
        return (flat @ weight_ih).view_as(x_TBD), by_weight_ih, by_weight_hh, by_bias_ih, by_bias_hh
