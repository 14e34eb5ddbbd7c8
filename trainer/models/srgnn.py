"""SR-GNN's session encoder (Wu et al. 2019): one graph per needed prefix of a session.

Letters: G graphs (one per requested state), T node slots (the session length), D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from etl.dataset import PADDING
from trainer.models.gru4rec import drop_clicks
from trainer.option_groups import ModelOptions

CHUNK_EDGES = 1 << 24
"""Maximum elements of `[G, T, T]` matrices: 64 MiB each, of which a forward pass needs about six."""


@dataclass(frozen=True)
class SessionGraphs:
    """Dense session graphs; the node of an item has the index of the item's first click.

    Attributes:
        session: int64 `[G]`, the session of each graph.
        clicks: float32 `[G, T]`, number of clicks on each node; 0 = no node.
        last: int64 `[G]`, node of the last click.
        latest: int64 `[G, T]`, position of the latest click on each node.
        outgoing, incoming: float32 `[G, T, T]`, weights of the edges from row to column, and from
            column to row: occurrences divided by the out- or in-degree of the row's node.
    """

    session: torch.Tensor
    clicks: torch.Tensor
    last: torch.Tensor
    latest: torch.Tensor
    outgoing: torch.Tensor
    incoming: torch.Tensor


def session_graphs(items_BT: torch.Tensor, needed_G: torch.Tensor) -> SessionGraphs:
    """Build the graphs of session prefixes.

    Args:
        items_BT: int64, right-padded sessions.
        needed_G: int64, positions in the flattened `[B * T]` of the prefixes' last clicks.
    """
    width = items_BT.shape[1]
    node_BT = first_occurrences(items_BT)
    session, end = needed_G // width, needed_G % width
    position = torch.arange(width, device=items_BT.device)
    inside = (position[None] <= end[:, None]) & (items_BT[session] != PADDING)
    node_GT = node_BT[session]
    graphs = len(needed_G)
    present = inside.to(torch.get_default_dtype())
    clicks = torch.zeros_like(present).scatter_add_(1, node_GT, present)
    edge = node_GT[:, :-1] * width + node_GT[:, 1:]
    count = torch.zeros(graphs, width * width, device=items_BT.device)
    count = count.scatter_add_(1, edge, present[:, 1:]).view(graphs, width, width)
    outgoing = count / count.sum(2, keepdim=True).clamp(min=1.0)
    incoming = count / count.sum(1, keepdim=True).clamp(min=1.0)
    last = node_GT.gather(1, end[:, None]).squeeze(1)
    latest = torch.zeros_like(node_GT).scatter_reduce_(1, node_GT, position * inside, "amax")
    return SessionGraphs(session, clicks, last, latest, outgoing, incoming.transpose(1, 2))


def first_occurrences(items_BT: torch.Tensor) -> torch.Tensor:
    """Position of the session's first click on the same item, int64 `[B, T]`, without comparing all pairs.

    >>> first_occurrences(torch.tensor([[7, 3, 7, 3, 9]])).tolist()
    [[0, 1, 0, 1, 4]]
    """
    ordered, order = torch.sort(items_BT, dim=1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    begin = torch.where(new, torch.arange(items_BT.shape[1], device=items_BT.device), 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, begin))


class SRGNNEncoder(nn.Module):
    """Gated graph layers over the session graph, then attention with the last click as the query.

    With v the node vectors, and A_out, A_in the graph's normalised adjacency (the paper's equations 1 to 7):

        a = [A_out v H_out ; A_in v H_in]        (its bias is merged with that of the W below)
        z = σ(W_z a + U_z v)    r = σ(W_r a + U_r v)    ṽ = tanh(W_o a + U_o (r ⊙ v))    v ← (1 − z) v + z ṽ
        α_i = qᵀ σ(W_1 v_last + W_2 v_i + c)    s = W_3 [v_last ; Σ_i α_i v_i]

    The sum is over clicks: an item clicked twice counts twice. With `network.past_actions` its clicks may
    differ: its node is initialised with the vector of the latest.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        size = options.embedding_dim
        self.steps, self.embedding_dropout = options.gnn_steps, options.embedding_dropout
        self.reads_latest = options.past_actions
        self.outgoing, self.incoming = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.from_edges = nn.Linear(2 * size, 3 * size)
        self.from_node = nn.Linear(size, 2 * size, bias=False)
        self.from_reset = nn.Linear(size, size, bias=False)
        self.attend_last, self.attend_node = nn.Linear(size, size), nn.Linear(size, size, bias=False)
        self.attention = nn.Linear(size, 1, bias=False)
        self.join = nn.Linear(2 * size, options.hidden_size, bias=False)
        self.dropout = nn.Dropout(options.state_dropout)

    def forward(self, items_BT: torch.Tensor, click_BTD: torch.Tensor, needed_N: torch.Tensor) -> torch.Tensor:
        """States `[N, H]` after the clicks at positions `needed_N` of the flattened `[B * T]`."""
        click_BTD = drop_clicks(click_BTD, self.embedding_dropout, training=self.training)
        at_once = max(1, CHUNK_EDGES // items_BT.shape[1] ** 2)
        if len(needed_N) <= at_once:
            return self.dropout(self._states(items_BT, click_BTD, needed_N))
        # Checkpointing: chunks are recomputed in backward; all graphs at once would grow with the cube of the length.
        chunks = [
            checkpoint(self._states, items_BT, click_BTD, part, use_reentrant=False) for part in needed_N.split(at_once)
        ]
        return self.dropout(torch.cat(chunks))

    def _states(self, items_BT: torch.Tensor, click_BTD: torch.Tensor, needed_N: torch.Tensor) -> torch.Tensor:
        """States before dropout, all graphs in memory at once."""
        graphs = session_graphs(items_BT, needed_N)
        # Most prefixes are shorter than the longest: only existing nodes are multiplied.
        present = torch.nonzero(graphs.clicks.flatten()).squeeze(1)
        if self.reads_latest:
            node_MD = click_BTD[graphs.session[present // items_BT.shape[1]], graphs.latest.flatten()[present]]
        else:
            node_MD = click_BTD[graphs.session].flatten(0, 1)[present]
        shape = (*graphs.clicks.shape, node_MD.shape[1])
        for _ in range(self.steps):
            node_MD = self._step(node_MD, graphs, present, shape)
        node_GTD = _spread(node_MD, present, shape)
        last_GD = node_GTD[torch.arange(len(node_GTD), device=node_GTD.device), graphs.last]
        attention_input = _spread(self.attend_node(node_MD), present, shape) + self.attend_last(last_GD)[:, None]
        weight_GT = self.attention(torch.sigmoid(attention_input)).squeeze(2) * graphs.clicks
        whole_GD = torch.bmm(weight_GT[:, None], node_GTD).squeeze(1)
        joined: torch.Tensor = self.join(torch.cat([last_GD, whole_GD], dim=1))
        return joined

    def _step(
        self, node_MD: torch.Tensor, graphs: SessionGraphs, present: torch.Tensor, shape: tuple[int, int, int]
    ) -> torch.Tensor:
        sent = [
            torch.bmm(graphs.outgoing, _spread(self.outgoing(node_MD), present, shape)),
            torch.bmm(graphs.incoming, _spread(self.incoming(node_MD), present, shape)),
        ]
        arrived = torch.cat([part.flatten(0, 1)[present] for part in sent], dim=1)
        update, reset, candidate = self.from_edges(arrived).chunk(3, dim=1)
        node_update, node_reset = self.from_node(node_MD).chunk(2, dim=1)
        update, reset = torch.sigmoid(update + node_update), torch.sigmoid(reset + node_reset)
        candidate = torch.tanh(candidate + self.from_reset(reset * node_MD))
        return (1.0 - update) * node_MD + update * candidate

    def flops(self, clicks: int) -> int:
        """FLOPs (multiply-adds × 2) of one state's forward pass: a graph of `clicks` distinct clicks."""
        matrices = [self.outgoing, self.incoming, self.from_edges, self.from_node, self.from_reset]
        step = clicks * sum(m.weight.numel() for m in matrices) + 2 * clicks**2 * self.outgoing.in_features
        read = self.attend_last.weight.numel() + self.join.weight.numel()
        read += clicks * (self.attend_node.weight.numel() + 2 * self.attention.in_features)
        return 2 * (self.steps * step + read)


def _spread(value_MD: torch.Tensor, present: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Scatter node values to `[G, T, D]`, zero elsewhere."""
    flat = value_MD.new_zeros(shape[0] * shape[1], value_MD.shape[1])
    return flat.index_copy(0, present, value_MD).view(*shape[:2], -1)
