"""Item vectors and biases with their optimiser state, updated row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from etl.contract import PADDING


@dataclass(frozen=True)
class Rows:
    """Rows of the table as leaves of the graph: gradients land in `vector.grad` and `bias.grad`.

    Attributes:
        ids: int64 `[U]`, dense ids, rising.
        vector: float32 `[U, D]`.
        bias: float32 `[U]`.
    """

    ids: torch.Tensor
    vector: torch.Tensor
    bias: torch.Tensor

    def gradient(self) -> torch.Tensor:
        """Gradients of vector and bias side by side, `[U, D + 1]`."""
        vector = torch.zeros_like(self.vector) if self.vector.grad is None else self.vector.grad
        bias = torch.zeros_like(self.bias) if self.bias.grad is None else self.bias.grad
        return torch.cat([vector, bias[:, None]], dim=1)


class ItemTable:
    """Vectors `[n_items + 1, D]` and biases of all items; row 0 is padding and stays zero.

    The optimiser is row-wise Adagrad: one accumulator a row, to which the mean square of the row's
    gradient is added (as in DLRM), so its state is 1 / D of the table.
    """

    def __init__(self, n_items: int, dimension: int, *, generator: torch.Generator, device: torch.device) -> None:
        vector = torch.empty(n_items + 1, dimension).normal_(0.0, dimension**-0.5 * 0.5, generator=generator)
        vector[PADDING] = 0.0
        self.vector = vector.to(device)
        self.bias = torch.zeros(n_items + 1, device=device)
        self.vector_state = torch.zeros(n_items + 1, device=device)
        self.bias_state = torch.zeros(n_items + 1, device=device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state, by name, for a checkpoint."""
        return {
            "vector": self.vector,
            "bias": self.bias,
            "vector_state": self.vector_state,
            "bias_state": self.bias_state,
        }

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over the state of a checkpoint."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def rows(self, ids: torch.Tensor) -> Rows:
        """Copies of distinct rows that gradients can flow into."""
        return Rows(ids, self.vector[ids].requires_grad_(), self.bias[ids].requires_grad_())

    @torch.no_grad()
    def update(self, ids: torch.Tensor, gradient: torch.Tensor, learning_rate: float, eps: float = 1e-6) -> None:
        """One Adagrad step on distinct rows.

        Args:
            ids: int64 `[U]`, distinct.
            gradient: float32 `[U, D + 1]`, the bias last.
            learning_rate: of the step.
            eps: added to the root of the accumulator.
        """
        vector_gradient, bias_gradient = gradient[:, :-1], gradient[:, -1]
        state = self.vector_state[ids] + vector_gradient.square().mean(dim=1)
        self.vector_state[ids] = state
        self.vector[ids] -= learning_rate * vector_gradient / (state.sqrt() + eps)[:, None]
        state = self.bias_state[ids] + bias_gradient.square()
        self.bias_state[ids] = state
        self.bias[ids] -= learning_rate * bias_gradient / (state.sqrt() + eps)
        self.vector[PADDING] = 0.0
        self.bias[PADDING] = 0.0
