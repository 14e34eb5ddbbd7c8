"""Session encoders by name."""

from __future__ import annotations

from torch import nn

from trainer.models.gru4rec import GRUEncoder
from trainer.models.nextitnet import NextItNetEncoder
from trainer.models.sasrec import SASRecEncoder
from trainer.models.srgnn import SRGNNEncoder

ENCODERS: dict[str, type[GRUEncoder] | type[SRGNNEncoder] | type[SASRecEncoder] | type[NextItNetEncoder]] = {
    "gru4rec": GRUEncoder,
    "srgnn": SRGNNEncoder,
    "sasrec": SASRecEncoder,
    "nextitnet": NextItNetEncoder,
}
"""Each maps items `[B, T]`, their vectors `[B, T, D]` and places `[N]` of the flattened `[B * T]` to the
states `[N, H]` after those clicks, and says with `flops(clicks)` what one state costs."""


def matrix_flops(module: nn.Module | None) -> int:
    """Multiply-adds × 2 of a network whose every matrix is met once an example."""
    return 0 if module is None else 2 * sum(p.numel() for p in module.parameters() if p.dim() == 2)
