"""Exact ranks of targets among all candidates, locally or over the shards of the item table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from etl.runtime.arrays import IntArray
from retrieval.metrics.ranking import MISS
from trainer.distributed.world import World
from trainer.inference.scorer import SessionScorer

if TYPE_CHECKING:
    from scipy import sparse

CHUNK_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Maximum scores, or elements of candidate vectors, per block, by device. On a CPU a block of 2 MB stays in the cache;
blocks of 64 MB took 2.5 times as long, half of that for page faults."""
PAIRS_AT_ONCE = 1 << 14
"""Maximum near-ties that are compared in float64 at once: all items may have the same vector."""


@dataclass(frozen=True)
class RankRequest:
    """Queries whose targets are to be ranked.

    Attributes:
        query_QD: queries.
        own_Q: float64, scores of the targets.
        target_Q: int64, dense ids of the targets.
        seen_2P: excluded (query, item) pairs; an excluded target is a miss.
        term_QI: sparse term added to the scores; None = not used.
    """

    query_QD: torch.Tensor
    own_Q: torch.Tensor
    target_Q: torch.Tensor
    seen_2P: torch.Tensor
    term_QI: sparse.csr_matrix | None = None

    def ranks(self, ahead_Q: torch.Tensor) -> IntArray:
        """Rank of each target, int64 `[Q]`, from the number of other candidates that do not score below it."""
        rank = 1 + ahead_Q
        query, item = self.seen_2P
        rank[query[item == self.target_Q[query]]] += MISS // 2  # no overflow when counts are added
        rank[~torch.isfinite(self.own_Q)] = MISS
        return rank.cpu().numpy()


@torch.inference_mode()
def rank_request(
    scorer: SessionScorer,
    query_QD: torch.Tensor,
    target_Q: torch.Tensor,
    seen_2P: torch.Tensor | None = None,
    term_QI: sparse.csr_matrix | None = None,
) -> RankRequest:
    """Build the request of queries and their targets."""
    target_Q = target_Q.to(query_QD.device)
    if term_QI is not None:
        term_QI.sum_duplicates()  # sorts the columns
    rows = torch.arange(len(target_Q), device=query_QD.device)
    own = _exact_scores(query_QD, rows, scorer.item_vectors(target_Q), target_Q, term_QI)
    none = torch.zeros_like(target_Q[:0]).expand(2, 0)
    return RankRequest(query_QD, own, target_Q, none if seen_2P is None else seen_2P.to(own.device), term_QI)


def exact_ranks(scorer: SessionScorer, request: RankRequest, candidate_C: torch.Tensor) -> IntArray:
    """Rank of each target among all candidates, int64 `[Q]`; ties and NaN count against the target.

    Args:
        scorer: provides the candidates' vectors.
        request: the queries.
        candidate_C: dense ids of the candidates, sorted; the targets are among them.
    """
    return request.ranks(count_ahead(scorer, request, candidate_C))


@torch.inference_mode()
def count_ahead(scorer: SessionScorer, request: RankRequest, candidate_C: torch.Tensor) -> torch.Tensor:
    """Number of candidates, without the target and seen items, that score at least as high as it, int64 `[Q]`.

    Candidates are scored in blocks: a copy of a large catalogue would double the memory. Products of float32 round
    equal vectors differently, so scores as near to the target's as their rounding error are computed in float64.
    """
    own, ahead = request.own_Q, torch.zeros_like(request.target_Q)
    if not len(candidate_C):
        return ahead
    # The target itself is excluded by id.
    itself = torch.stack([torch.arange(len(own), device=own.device), request.target_Q])
    query, item = torch.cat([itself, request.seen_2P], dim=1)
    query, index = query[known := _known(item, candidate_C)], torch.searchsorted(candidate_C, item[known])
    added = None
    if request.term_QI is not None:
        term_query, item, value = _entries(request.term_QI, own.device)
        known = _known(item, candidate_C)
        added = term_query[known], torch.searchsorted(candidate_C, item[known]), value[known]
    step = max(1, CHUNK_NUMBERS[own.device.type] // max(len(own), scorer.dimension))
    eps = torch.finfo(torch.float32).eps
    error_Q = request.query_QD.norm(dim=1) * (scorer.dimension * eps)
    for begin in range(0, len(candidate_C), step):
        vectors = scorer.item_vectors(candidate_C[begin : begin + step])
        score = request.query_QD @ vectors.t()
        if added is not None:
            chosen = (added[1] >= begin) & (added[1] < begin + step)
            cell = (added[0][chosen], added[1][chosen] - begin)
            score.index_put_(cell, added[2][chosen], accumulate=True)
        masked = (index >= begin) & (index < begin + step)
        score[query[masked], index[masked] - begin] = -torch.inf
        error = (error_Q * vectors.norm(dim=1).max() + own.abs() * eps).nan_to_num(0.0, posinf=0.0)
        below, above = (own - error).float()[:, None], (own + error).float()[:, None]
        # 0 and 1 as floats: these compare and sum in half the time of booleans.
        flags = torch.empty_like(score)
        min_ahead = len(vectors) - torch.le(score, above, out=flags).sum(1).long()
        max_ahead = len(vectors) - torch.lt(score, below, out=flags).sum(1).long()
        ahead += min_ahead
        unsure = (min_ahead != max_ahead).nonzero().flatten()
        near = score[unsure]
        near = (near >= below[unsure]) & (near <= above[unsure])
        for pairs in near.nonzero().split(PAIRS_AT_ONCE):
            row, column = unsure[pairs[:, 0]], pairs[:, 1]
            exact = _exact_scores(request.query_QD, row, vectors[column], candidate_C[begin + column], request.term_QI)
            ahead.index_add_(0, row, (exact >= own[row]).long())
    return ahead


def _exact_scores(
    query_QD: torch.Tensor,
    row_N: torch.Tensor,
    vector_ND: torch.Tensor,
    item_N: torch.Tensor,
    term_QI: sparse.csr_matrix | None,
) -> torch.Tensor:
    """Scores of (query, item) pairs, float64 `[N]`, summed in the same order: equal vectors have equal scores."""
    score = torch.einsum("nd,nd->n", query_QD[row_N].double(), vector_ND.double())
    if term_QI is not None:
        from retrieval.sources.sparse_rows import entries_at  # scipy: slow import, not needed without transitions

        values = entries_at(term_QI, row_N.cpu().numpy(), item_N.cpu().numpy())
        score += torch.from_numpy(values.astype(np.float64)).to(score.device)
    return score


def ranks_by_owners(
    local: SessionScorer, requests: list[RankRequest], own_candidate_C: torch.Tensor, world: World
) -> Iterator[IntArray]:
    """Ranks of this worker's requests; every worker counts over the candidates that it owns.

    Queries are sent to the vectors, which are many more. Collective.

    Args:
        local: reads this worker's rows (`SessionScorer.local_shard_scorer`).
        requests: the queries, any number on each worker.
        own_candidate_C: dense ids of the candidates that this worker owns, sorted.
        world: the workers.
    """
    device = local.device
    for number in range(max(world.gather(len(requests)))):
        mine = requests[number] if number < len(requests) else None
        sent = None if mine is None else [t.cpu() for t in (mine.query_QD, mine.own_Q, mine.target_Q, mine.seen_2P)]
        received = [RankRequest(*(t.to(device) for t in other)) for other in world.gather(sent) if other is not None]
        counts = world.gather([count_ahead(local, other, own_candidate_C).cpu() for other in received])
        if mine is not None:
            # Workers without a request have the highest global ranks.
            ahead = torch.stack([of_worker[world.global_rank] for of_worker in counts]).sum(0)
            yield mine.ranks(ahead.to(device))


def _known(item: torch.Tensor, candidate_C: torch.Tensor) -> torch.Tensor:
    """Mask of the items that are candidates."""
    return candidate_C[torch.searchsorted(candidate_C, item).clamp(max=len(candidate_C) - 1)] == item


def _entries(term_QI: sparse.csr_matrix, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, item and value of the sparse term's entries."""
    query_E = np.repeat(np.arange(term_QI.shape[0]), np.diff(term_QI.indptr))
    arrays = (query_E, term_QI.indices.astype(np.int64), term_QI.data.astype(np.float32))
    query, item, value = (torch.from_numpy(values).to(device) for values in arrays)
    return query, item, value
