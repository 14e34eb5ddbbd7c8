"""Item feature embeddings (category and others), added to the item vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from etl.runtime.arrays import IntArray
from trainer.models.embedding_table import GatheredRows, ReadTable


class ItemFeatures(nn.Module):
    """Adds the sum of an item's feature embeddings to its own vector.

    Items without train clicks (cold items) use their features only, since their own vector stays at its random
    initialisation (cf. DropoutNet, Volkovs et al. 2017, which drops the own part at random). Feature values have a
    separate table, in which row 0, unknown, stays zero.

    Args:
        codes_IC: int64 `[n_items + 1, C]`, code of each feature's value, 0 = unknown.
        train_clicks: int64 `[n_items]`.
        tables: names of the item tables; each gets its own feature table.
    """

    codes: torch.Tensor
    known: torch.Tensor

    def __init__(self, codes_IC: IntArray, train_clicks: IntArray, tables: Sequence[str]) -> None:
        super().__init__()
        self.register_buffer("codes", torch.from_numpy(codes_IC), persistent=False)
        known = np.append([False], train_clicks > 0)[:, None].astype(np.float32)
        self.register_buffer("known", torch.from_numpy(known), persistent=False)
        self.n_values = int(codes_IC.max(initial=0))
        self.table_of = {name: f"{name}_features" for name in tables}

    @classmethod
    def none(cls) -> ItemFeatures:
        """Without features: vectors are unchanged."""
        return cls(np.zeros((1, 0), np.int64), np.zeros(0, np.int64), [])

    def split(self, vector_ID: torch.Tensor, counted_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split item vectors into the items' own parts and the feature embeddings.

        A value gets the mean of its items' vectors, divided by the number of columns, and an item the rest, so that the
        sum is unchanged, and an item without a vector starts near items with the same features.

        Args:
            vector_ID: `[n_items, D]`.
            counted_N: rows that have a vector, sorted; the others are ignored.

        Returns:
            float32 own vectors of `counted_N` `[N, D]`, and feature embeddings `[n_values + 1, D]`, row 0 zero.
        """
        if not self.table_of:
            return vector_ID[counted_N], vector_ID[:0]
        vector = vector_ID[counted_N].double().cpu()
        codes = self.codes.cpu()[counted_N.cpu() + 1]
        value = torch.zeros(self.n_values + 1, vector.shape[1], dtype=torch.float64)
        for column in codes.T:
            value.index_add_(0, column, vector)
        times = torch.bincount(codes.flatten(), minlength=self.n_values + 1)[:, None]
        value /= times.clamp(min=1) * max(codes.shape[1], 1)
        value[0] = 0.0
        own = vector - value[codes].sum(1)
        return own.float().to(vector_ID.device), value.float().to(vector_ID.device)

    def with_values(self, ids_of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add the ids of the feature tables to the ids that a step reads, by table."""
        return ids_of | {of: self.codes[ids_of[name]].flatten() for name, of in self.table_of.items()}

    def join(self, rows: dict[str, GatheredRows]) -> dict[str, GatheredRows]:
        """Rows by table, with feature embeddings added to the item rows; gradients flow into both."""
        joined = dict(rows)
        for name, of in self.table_of.items():
            own = rows[name]
            of_values = rows[of].vectors(self.codes[own.ids]).sum(-2)
            joined[name] = GatheredRows(own.ids, own.vector * self.known[own.ids] + of_values, own.bias)
        return joined

    def vectors(self, tables: Mapping[str, ReadTable], name: str, ids: torch.Tensor) -> torch.Tensor:
        """Vectors `[..., D]` of items `[...]` in a table, with feature embeddings added."""
        return self.read(tables, name, ids)[0]

    def read(self, tables: Mapping[str, ReadTable], name: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `[..., D]` of items `[...]` in a table, with feature embeddings added, and biases `[...]`."""
        own, bias = tables[name].read(ids)
        if name not in self.table_of:
            return own, bias
        of_values, _ = tables[self.table_of[name]].read(self.codes[ids])
        return own * self.known[ids] + of_values.sum(-2), bias
