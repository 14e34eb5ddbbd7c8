"""Losses of the next item and of feedback, as sums over examples.

N examples, K candidates (negatives), D dimensions.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_SCORES = 1 << 22
"""Scores `[examples × candidates]` held at once: 16 MiB of float32."""
HIT = -1e30
"""Score of a candidate that is the example's own target."""


class _FusedSoftmax(torch.autograd.Function):
    """Cross-entropy of each target against shared candidates, summed, in bounded memory.

    The gradient is worked out chunk by chunk while the scores are at hand, so that the `[N × K]`
    matrix is never kept; the result being one number, backward only scales it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_ND: torch.Tensor,
        positive_ND: torch.Tensor,
        positive_bias_N: torch.Tensor,
        candidate_KD: torch.Tensor,
        candidate_bias_K: torch.Tensor,
        hit_row: torch.Tensor,
        hit_column: torch.Tensor,
    ) -> torch.Tensor:
        n, k = len(query_ND), len(candidate_KD)
        grads = [
            torch.empty_like(query_ND),
            torch.empty_like(positive_ND),
            torch.empty_like(positive_bias_N),
            torch.zeros_like(candidate_KD),
            torch.zeros_like(candidate_bias_K),
        ]
        total = query_ND.new_zeros((), dtype=torch.float64)
        step = max(1, CHUNK_SCORES // max(k, 1))
        for begin in range(0, n, step):
            part = slice(begin, begin + step)
            query, positive = query_ND[part], positive_ND[part]
            score = torch.addmm(candidate_bias_K, query, candidate_KD.t())
            inside = (hit_row >= begin) & (hit_row < begin + step)
            score[hit_row[inside] - begin, hit_column[inside]] = HIT
            own = (query * positive).sum(1) + positive_bias_N[part]
            top = torch.maximum(score.amax(1), own)
            weight = score.sub_(top[:, None]).exp_()
            own_weight = (own - top).exp()
            normaliser = weight.sum(1) + own_weight
            total += (normaliser.log() + top - own).sum(dtype=torch.float64)
            weight /= normaliser[:, None]
            own_gradient = own_weight / normaliser - 1.0
            grads[0][part] = weight @ candidate_KD + own_gradient[:, None] * positive
            grads[1][part] = own_gradient[:, None] * query
            grads[2][part] = own_gradient
            grads[3] += weight.t() @ query
            grads[4] += weight.sum(0)
        ctx.save_for_backward(*grads)
        return total.to(query_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*(gradient * upstream[0] for gradient in ctx.saved_tensors), None, None)


def softmax_sum(
    query_ND: torch.Tensor,
    positive_ND: torch.Tensor,
    positive_bias_N: torch.Tensor,
    candidate_KD: torch.Tensor,
    candidate_bias_K: torch.Tensor,
    target_N: torch.Tensor,
    candidate_K: torch.Tensor,
) -> torch.Tensor:
    """Sum over examples of −log softmax of the target among itself and the candidates.

    A candidate that is the example's own target (an accidental hit) does not compete with it.

    With all items as candidates and their biases as they are this is the full softmax. With K sampled
    candidates, give `bias − log(K q)`: then the candidates' sum estimates that of all other items
    without bias (the logQ correction; Bengio and Senécal 2008).

    Args:
        query_ND: session queries.
        positive_ND, positive_bias_N: vector and bias of each target.
        candidate_KD, candidate_bias_K: of the shared candidates, corrected.
        target_N, candidate_K: their ids, to find accidental hits.
    """
    row, column = accidental_hits(target_N, candidate_K)
    return _FusedSoftmax.apply(query_ND, positive_ND, positive_bias_N, candidate_KD, candidate_bias_K, row, column)


def accidental_hits(target_N: torch.Tensor, candidate_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (example, candidate place) with the same id, found by sorting instead of `[N × K]` comparisons."""
    ordered, place = torch.sort(candidate_K)
    low = torch.searchsorted(ordered, target_N)
    count = torch.searchsorted(ordered, target_N, right=True) - low
    row = torch.repeat_interleave(torch.arange(len(target_N), device=target_N.device), count)
    first = torch.cumsum(count, 0) - count
    within = torch.arange(len(row), device=target_N.device) - first[row]
    return row, place[low[row] + within]


def feedback_sum(logit_F: torch.Tensor, label_F: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the binary cross-entropy of a feedback task."""
    return torch.nn.functional.binary_cross_entropy_with_logits(logit_F, label_F, reduction="sum")
