"""Embedding tables of items or users with optimiser state and sparse updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from etl.dataset import PADDING

DRAWN_ROWS = 65_536
"""Rows drawn at a time; a multiple of 16, since torch draws normal numbers in blocks of 16."""


@dataclass(frozen=True)
class Shard:
    """A table shard: every `size`-th row, starting at row `rank`.

    >>> Shard(1, 3).ids(8).tolist()
    [1, 4, 7]
    """

    rank: int = 0
    size: int = 1

    def ids(self, n: int) -> torch.Tensor:
        """Ids of the shard's rows in a table of `n` rows, int64."""
        return torch.arange(self.rank, max(self.rank, n), self.size)

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        """Local index of rows of the shard."""
        return ids if self.size == 1 else ids // self.size


FULL_TABLE = Shard()


@dataclass(frozen=True)
class GatheredRows:
    """Gathered rows of a table as leaves of the autograd graph: gradients are in `vector.grad` and `bias.grad`.

    Attributes:
        ids: int64 `[U]`, sorted.
        vector: float32 `[U, D]`.
        bias: float32 `[U]`; empty `[0]` if the table has none.
    """

    ids: torch.Tensor
    vector: torch.Tensor
    bias: torch.Tensor

    def local_index(self, ids: torch.Tensor) -> torch.Tensor:
        """Row index of each id, in the shape of `ids`."""
        return torch.searchsorted(self.ids, ids)

    def vectors(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors of ids, `[..., D]`."""
        return torch.nn.functional.embedding(self.local_index(ids), self.vector)

    def gradient(self) -> torch.Tensor:
        """Concatenated gradients `[U, D + 1]` of vector and bias; `[U, D]` without bias."""
        vector = torch.zeros_like(self.vector) if self.vector.grad is None else self.vector.grad
        if not self.bias.numel():
            return vector
        bias = torch.zeros_like(self.bias) if self.bias.grad is None else self.bias.grad
        return torch.cat([vector, bias[:, None]], dim=1)


class ReadTable(Protocol):
    """A table read at inference: local, or sharded over workers."""

    n_rows: int
    dimension: int

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `[..., D]` and biases `[...]` of ids `[...]`; biases are empty for a table without bias."""


class FixedTable:
    """All rows of a table, for reading only.

    Args:
        vector: `[n + 1, D]`.
        bias: `[n + 1]`, or empty for a table without bias.
    """

    def __init__(self, vector: torch.Tensor, bias: torch.Tensor) -> None:
        self.vector, self.bias = vector, bias
        self.n_rows, self.dimension = vector.shape

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `[..., D]` and biases `[...]` of ids `[...]`; biases are empty for a table without bias."""
        return self.vector[ids], self.bias[ids] if len(self.bias) else self.bias


class SparseTable:
    """Vectors `[n + 1, D]` and biases of n items or users; row 0 is padding and stays zero.

    A shard stores only its own rows. All methods take row ids of the complete table.

    The optimiser is Adagrad. Row-wise it has one accumulator per row, which sums the mean square of the row's
    gradient (as in DLRM), so its state is 1 / D of the table; else one per element.

    Args:
        n: number of rows without the padding.
        dimension: D.
        generator: initialises the vectors.
        device: of all tensors.
        bias: whether rows have a bias.
        rowwise: whether to keep one accumulator per row.
        shard: the rows to hold; they are initialised as in the complete table.

    Attributes:
        learning_rate_factor: factor on the learning rate for this table.
        n_rows: n + 1, rows of the complete table.
        dimension: D.
        has_bias: whether rows have a bias.
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
        shard: Shard = FULL_TABLE,
    ) -> None:
        self.learning_rate_factor, self.shard = 1.0, shard
        self.n_rows, self.dimension, self.has_bias = n + 1, dimension, bias
        self.vector = drawn_rows(n + 1, dimension, generator, shard).to(device)
        here = len(self.vector)
        self.vector_state = torch.zeros((here,) if rowwise else (here, dimension), device=device)
        biases = here if bias else 0
        self.bias, self.bias_state = torch.zeros(biases, device=device), torch.zeros(biases, device=device)
        self._zero_padding_row()

    def _zero_padding_row(self) -> None:
        """Zero the padding row, the first row of owner 0."""
        if self.shard.rank == PADDING:
            self.vector[PADDING] = 0.0
            self.bias[PADDING : PADDING + 1] = 0.0

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state by name, for checkpoints."""
        return {
            "vector": self.vector,
            "bias": self.bias,
            "vector_state": self.vector_state,
            "bias_state": self.bias_state,
        }

    def parameters(self) -> int:
        """Number of learned parameters, over all shards."""
        return self.n_rows * (self.dimension + self.has_bias)

    def set_initial_biases(self, bias_N: torch.Tensor) -> None:
        """Set the initial biases of items 1..n."""
        own = self.shard.ids(self.n_rows)
        own = own[own != PADDING]
        self.bias[self.shard.local(own)] = bias_N[own - 1].to(self.bias.device, self.bias.dtype)

    def state_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """All state of distinct rows, concatenated, float32 `[U, S]`."""
        ids = self.shard.local(ids)
        return torch.cat([t[ids].view(len(ids), t[0].numel()) for t in self.tensors().values() if t.numel()], dim=1)

    def load_state_rows(self, ids: torch.Tensor, state_US: torch.Tensor) -> None:
        """Load what `state_rows` returned on another worker."""
        tensors = [t for t in self.tensors().values() if t.numel()]
        widths, ids = [t[0].numel() for t in tensors], self.shard.local(ids)
        for tensor, part in zip(tensors, state_US.split(widths, dim=1), strict=True):
            tensor[ids] = part.view(len(ids), *tensor.shape[1:])

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `[..., D]` and biases `[...]` of ids `[...]`; biases are empty for a table without bias."""
        ids = self.shard.local(ids)
        return self.vector[ids], self.bias[ids] if self.has_bias else self.bias

    def values(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors of rows with the bias as the last element, `[U, D + 1]`; `[U, D]` without bias."""
        vector, bias = self.read(ids)
        return torch.cat([vector, bias[:, None]], dim=1) if self.has_bias else vector

    def rows(self, ids: torch.Tensor) -> GatheredRows:
        """Differentiable copies of distinct rows."""
        vector, bias = self.read(ids)
        return GatheredRows(ids, vector.requires_grad_(), bias.clone().requires_grad_())

    def rows_from_owners(self, ids: torch.Tensor, values: torch.Tensor) -> GatheredRows:
        """Differentiable rows from the `values` sent by their owners."""
        vector, bias = values[:, : self.dimension], values[:, self.dimension :].flatten()
        return GatheredRows(ids, vector.clone().requires_grad_(), bias.clone().requires_grad_())

    @torch.no_grad()
    def update(
        self, ids: torch.Tensor, gradient: torch.Tensor, learning_rate: float, *, decay: float = 0.0, eps: float = 1e-6
    ) -> None:
        """One Adagrad step on distinct rows.

        Args:
            ids: int64 `[U]`, distinct.
            gradient: float32 `[U, D + 1]`, the bias last; `[U, D]` without bias.
            learning_rate: of the step.
            decay: weight decay; × the vector, added to its gradient.
            eps: added to the root of the accumulator.
        """
        size, ids = self.dimension, self.shard.local(ids)
        vector_gradient = gradient[:, :size]
        if decay:
            vector_gradient = vector_gradient + decay * self.vector[ids]
        square = vector_gradient.square()
        state = self.vector_state[ids] + (square.mean(dim=1) if self.vector_state.dim() == 1 else square)
        self.vector_state[ids] = state
        root = state.sqrt() + eps
        self.vector[ids] -= learning_rate * vector_gradient / (root[:, None] if root.dim() == 1 else root)
        if self.has_bias:
            bias_gradient = gradient[:, size]
            state = self.bias_state[ids] + bias_gradient.square()
            self.bias_state[ids] = state
            self.bias[ids] -= learning_rate * bias_gradient / (state.sqrt() + eps)
        self._zero_padding_row()


def drawn_rows(n_rows: int, dimension: int, generator: torch.Generator, shard: Shard) -> torch.Tensor:
    """The shard's rows `[R, D]` of a table of normal numbers, bit-identical to drawing the table at once.

    Every owner draws the complete table, `DRAWN_ROWS` rows at a time, and keeps its own.
    """
    result = torch.empty(len(range(shard.rank, n_rows, shard.size)), dimension)
    last = max(0, n_rows - 16)  # torch draws fewer than 16 numbers differently
    begins = [begin for begin in range(0, n_rows, DRAWN_ROWS) if begin <= last]
    for begin, end in zip(begins, [*begins[1:], n_rows], strict=True):
        rows = torch.empty(end - begin, dimension).normal_(0.0, dimension**-0.5 * 0.5, generator=generator)
        own = rows[(shard.rank - begin) % shard.size :: shard.size]
        first = -(-(begin - shard.rank) // shard.size) if begin > shard.rank else 0
        result[first : first + len(own)] = own
    return result
