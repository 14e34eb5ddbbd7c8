"""Vectors of items or users with their optimiser state, updated row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from etl.dataset import PADDING


@dataclass(frozen=True)
class Rows:
    """Rows of a table as leaves of the graph: gradients land in `vector.grad` and `bias.grad`.

    Attributes:
        ids: int64 `[U]`, rising.
        vector: float32 `[U, D]`.
        bias: float32 `[U]`; empty `[0]` where the table has none.
    """

    ids: torch.Tensor
    vector: torch.Tensor
    bias: torch.Tensor

    def place(self, ids: torch.Tensor) -> torch.Tensor:
        """Where ids stand among the rows, in the shape of `ids`."""
        return torch.searchsorted(self.ids, ids)

    def vectors(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors of ids, `[..., D]`."""
        return torch.nn.functional.embedding(self.place(ids), self.vector)

    def gradient(self) -> torch.Tensor:
        """Gradients `[U, D + 1]` of vector and bias side by side; `[U, D]` without bias."""
        vector = torch.zeros_like(self.vector) if self.vector.grad is None else self.vector.grad
        if not self.bias.numel():
            return vector
        bias = torch.zeros_like(self.bias) if self.bias.grad is None else self.bias.grad
        return torch.cat([vector, bias[:, None]], dim=1)


class SparseTable:
    """Vectors `[n + 1, D]` and biases of n items or users; row 0 is padding and stays zero.

    The optimiser is Adagrad. Row-wise it has one accumulator a row, to which the mean square of the row's
    gradient is added (as in DLRM), so its state is 1 / D of the table; else one for each value.

    Args:
        n: rows without the padding.
        dimension: D.
        generator: draws the vectors.
        device: where all of it lies.
        bias: whether rows have a bias.
        rowwise: one accumulator a row.

    Attributes:
        rate: what the step's learning rate is multiplied with for this table.
    """

    def __init__(
        self,
        n: int,
        dimension: int,
        *,
        generator: torch.Generator,
        device: torch.device,
        bias: bool = True,
        rowwise: bool = True,
    ) -> None:
        self.rate = 1.0
        vector = torch.empty(n + 1, dimension).normal_(0.0, dimension**-0.5 * 0.5, generator=generator)
        vector[PADDING] = 0.0
        self.vector = vector.to(device)
        self.vector_state = torch.zeros((n + 1,) if rowwise else (n + 1, dimension), device=device)
        biases = n + 1 if bias else 0
        self.bias, self.bias_state = torch.zeros(biases, device=device), torch.zeros(biases, device=device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state, by name, for a checkpoint."""
        return {
            "vector": self.vector,
            "bias": self.bias,
            "vector_state": self.vector_state,
            "bias_state": self.bias_state,
        }

    def parameters(self) -> int:
        """How many numbers are learned."""
        return self.vector.numel() + self.bias.numel()

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over the state of a checkpoint."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    def state_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """All state of distinct rows side by side, float32 `[U, S]`."""
        return torch.cat([t[ids].view(len(ids), t[0].numel()) for t in self.tensors().values() if t.numel()], dim=1)

    def put_state_rows(self, ids: torch.Tensor, state_US: torch.Tensor) -> None:
        """Take over what `state_rows` gave on another worker."""
        tensors = [t for t in self.tensors().values() if t.numel()]
        widths = [t[0].numel() for t in tensors]
        for tensor, part in zip(tensors, state_US.split(widths, dim=1), strict=True):
            tensor[ids] = part.view(len(ids), *tensor.shape[1:])

    def rows(self, ids: torch.Tensor) -> Rows:
        """Copies of distinct rows that gradients can flow into."""
        bias = self.bias[ids] if self.bias.numel() else self.bias
        return Rows(ids, self.vector[ids].requires_grad_(), bias.clone().requires_grad_())

    @torch.no_grad()
    def update(
        self, ids: torch.Tensor, gradient: torch.Tensor, learning_rate: float, *, decay: float = 0.0, eps: float = 1e-6
    ) -> None:
        """One Adagrad step on distinct rows.

        Args:
            ids: int64 `[U]`, distinct.
            gradient: float32 `[U, D + 1]`, the bias last; `[U, D]` without bias.
            learning_rate: of the step.
            decay: × the vector, added to its gradient.
            eps: added to the root of the accumulator.
        """
        size = self.vector.shape[1]
        vector_gradient = gradient[:, :size]
        if decay:
            vector_gradient = vector_gradient + decay * self.vector[ids]
        square = vector_gradient.square()
        state = self.vector_state[ids] + (square.mean(dim=1) if self.vector_state.dim() == 1 else square)
        self.vector_state[ids] = state
        root = state.sqrt() + eps
        self.vector[ids] -= learning_rate * vector_gradient / (root[:, None] if root.dim() == 1 else root)
        self.vector[PADDING] = 0.0
        if self.bias.numel():
            bias_gradient = gradient[:, size]
            state = self.bias_state[ids] + bias_gradient.square()
            self.bias_state[ids] = state
            self.bias[ids] -= learning_rate * bias_gradient / (state.sqrt() + eps)
            self.bias[PADDING] = 0.0
