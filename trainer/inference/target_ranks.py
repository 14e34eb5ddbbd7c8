"""Exact ranks of targets among all candidates, locally or over the shards of the item table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from retrieval.metrics.ranking import MISS
from trainer.data.order import Int
from trainer.distributed.world import World
from trainer.inference.scorer import SessionScorer

if TYPE_CHECKING:
    from scipy import sparse

CHUNK_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Maximum scores, or elements of candidate vectors, per block, by device. On a CPU a block of 2 MB stays in the cache;
blocks of 64 MB took 2.5 times as long, half of that for page faults."""


@dataclass(frozen=True)
class RankRequest:
    """Queries whose targets are to be ranked.

    Attributes:
        query_QD: queries.
        own_Q: scores of the targets.
        target_Q: int64, dense ids of the targets.
        seen_2P: excluded (query, item) pairs; an excluded target is a miss.
        term_QI: sparse term added to the scores; None = not used.
    """

    query_QD: torch.Tensor
    own_Q: torch.Tensor
    target_Q: torch.Tensor
    seen_2P: torch.Tensor
    term_QI: sparse.csr_matrix | None = None

    def ranks(self, ahead_Q: torch.Tensor) -> Int:
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
    own = (query_QD * scorer.item_vectors(target_Q)).sum(1)
    if term_QI is not None:
        query, item, value = _entries(term_QI, own.device)
        is_target = item == target_Q[query]
        own.index_add_(0, query[is_target], value[is_target])
    none = torch.zeros_like(target_Q[:0]).expand(2, 0)
    return RankRequest(query_QD, own, target_Q, none if seen_2P is None else seen_2P.to(own.device), term_QI)


def exact_ranks(scorer: SessionScorer, request: RankRequest, candidate_C: torch.Tensor) -> Int:
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

    Candidates are scored in blocks: a copy of a large catalogue would double the memory.
    """
    own, ahead = request.own_Q, torch.zeros_like(request.target_Q)
    if not len(candidate_C):
        return ahead
    # Products of other shapes may differ in the last bit, so the target is excluded by id.
    itself = torch.stack([torch.arange(len(own), device=own.device), request.target_Q])
    query, item = torch.cat([itself, request.seen_2P], dim=1)
    query, index = query[known := _known(item, candidate_C)], torch.searchsorted(candidate_C, item[known])
    added = None
    if request.term_QI is not None:
        term_query, item, value = _entries(request.term_QI, own.device)
        known = _known(item, candidate_C)
        added = term_query[known], torch.searchsorted(candidate_C, item[known]), value[known]
    step = max(1, CHUNK_NUMBERS[own.device.type] // max(len(own), scorer.dimension))
    for begin in range(0, len(candidate_C), step):
        score = request.query_QD @ scorer.item_vectors(candidate_C[begin : begin + step]).t()
        if added is not None:
            chosen = (added[1] >= begin) & (added[1] < begin + step)
            cell = (added[0][chosen], added[1][chosen] - begin)
            score.index_put_(cell, added[2][chosen], accumulate=True)
        masked = (index >= begin) & (index < begin + step)
        score[query[masked], index[masked] - begin] = -torch.inf
        ahead += (~(score < own[:, None])).sum(1)
    return ahead


def ranks_by_owners(
    scorer: SessionScorer, requests: list[RankRequest], own_candidate_C: torch.Tensor, world: World
) -> Iterator[Int]:
    """Ranks of this worker's requests; every worker counts over the candidates that it owns.

    Queries are sent to the vectors, which are many more. Collective.
    """
    device, local = scorer.device, scorer.local_shard_scorer()
    for number in range(max(world.gather(len(requests)))):
        mine = requests[number] if number < len(requests) else None
        sent = None if mine is None else [t.cpu() for t in (mine.query_QD, mine.own_Q, mine.target_Q, mine.seen_2P)]
        requests = [RankRequest(*(t.to(device) for t in other)) for other in world.gather(sent) if other is not None]
        counts = world.gather([count_ahead(local, other, own_candidate_C).cpu() for other in requests])
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
