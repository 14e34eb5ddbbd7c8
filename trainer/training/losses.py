"""Losses of the next item and of feedback, as sums over examples.

N examples, K candidates (negatives), D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CHUNK_SCORES = 1 << 19
"""Maximum scores `[examples × candidates]` in memory: 2 MiB of float32, so that a kernel's passes stay in the cache."""
MASKED_SCORE = -1e15
"""Masked score of an accidental hit; its square is still finite in float32."""


Kernel = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Maps scores `[N, K]` (may be overwritten) and target scores `[N]` to losses, gradients by target score, by score."""


def softmax_kernel(score_NK: torch.Tensor, own_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """−log softmax of the target among itself and the candidates."""
    top = torch.maximum(score_NK.amax(1), own_N)
    weight = score_NK.sub_(top[:, None]).exp_()
    own_weight = (own_N - top).exp()
    normaliser = weight.sum(1) + own_weight
    weight /= normaliser[:, None]
    return normaliser.log() + top - own_N, own_weight / normaliser - 1.0, weight


def bpr_max_kernel(regularisation: float, log_copies_K: torch.Tensor | None = None) -> Kernel:
    """BPR-max as in `bpr_max_sum`.

    With s the softmax of the scores r, σ = σ(own − r), A = Σ s σ and R = Σ s r², the loss −log A + λ R has the
    gradients Σ s σ² / A − 1 by the target's score and s (1 − σ² / A + λ (r² + 2 r − R)) by r.

    Args:
        regularisation: λ.
        log_copies_K: log multiplicity of each candidate among the negatives; default 0.
    """

    def kernel(score_NK: torch.Tensor, own_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        top = score_NK.amax(1)
        share = torch.softmax(score_NK if log_copies_K is None else score_NK + log_copies_K, dim=1)
        won = torch.sub(own_N[:, None], score_NK).sigmoid_()
        reward = row_dot(share, won) + 1e-24
        won.square_()
        own_gradient = row_dot(share, won) / reward - 1.0
        square = score_NK.square()
        size = row_dot(share, square)
        gradient = square.add_(score_NK, alpha=2.0).sub_(size[:, None]).mul_(regularisation).add_(1.0)
        gradient.addcmul_(won, reward.reciprocal()[:, None], value=-1.0).mul_(share)
        loss = regularisation * size - reward.log()
        alone = top <= MASKED_SCORE / 2  # all negatives are accidental hits: no loss
        if alone.any():
            loss, own_gradient = loss.masked_fill(alone, 0.0), own_gradient.masked_fill(alone, 0.0)
            gradient.masked_fill_(alone[:, None], 0.0)
        return loss, own_gradient, gradient

    return kernel


def hardest(score_NK: torch.Tensor, k: int) -> torch.Tensor:
    """Mask all but the k highest scores of each row (and ties with the k-th) with `MASKED_SCORE`; 0 = keep all."""
    if not 0 < k < score_NK.shape[1]:
        return score_NK
    kth_N1 = score_NK.detach().topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return score_NK.masked_fill(score_NK < kth_N1, MASKED_SCORE)


def hard_kernel(kernel: Kernel, k: int) -> Kernel:
    """A kernel over the k hardest negatives, those with the highest scores (TRON, Wilm et al. 2023)."""
    if not k:
        return kernel
    return lambda score_NK, own_N: kernel(hardest(score_NK, k), own_N)


def row_dot(a_NK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """Row-wise inner products of a and b, `[N]`."""
    return torch.bmm(a_NK[:, None, :], b_NK[:, :, None]).flatten()


def kernel_of(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Kernel:
    """The kernel of a loss of target scores and scores, differentiated by autograd."""

    def kernel(score_NK: torch.Tensor, own_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            score_NK.requires_grad_()
            own_N = own_N.detach().requires_grad_()
            total = loss(own_N, score_NK)
            by_own, by_score = torch.autograd.grad(total, (own_N, score_NK))
        return total.detach(), by_own, by_score

    return kernel


class _Fused(torch.autograd.Function):
    """Summed losses of targets against shared candidates, in bounded memory.

    Gradients are computed chunk by chunk in the forward pass, so that the `[N × K]` matrix is never stored;
    since the result is a scalar, backward only scales them.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)  # under autocast queries are bfloat16
    def forward(
        ctx: Any,
        kernel: Kernel,
        query_ND: torch.Tensor,
        positive_ND: torch.Tensor,
        positive_bias_N: torch.Tensor,
        candidate_KD: torch.Tensor,
        candidate_bias_K: torch.Tensor,
        *hits: torch.Tensor,
    ) -> torch.Tensor:
        hit_row, hit_column = hits
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
            score[hit_row[inside] - begin, hit_column[inside]] = MASKED_SCORE
            own = (query * positive).sum(1) + positive_bias_N[part]
            loss, own_gradient, gradient = kernel(score, own)
            total += loss.sum(dtype=torch.float64)
            grads[0][part] = torch.addmm(own_gradient[:, None] * positive, gradient, candidate_KD)
            grads[1][part] = own_gradient[:, None] * query
            grads[2][part] = own_gradient
            grads[3].addmm_(gradient.t(), query)
            grads[4] += gradient.sum(0)
        ctx.save_for_backward(*grads)
        return total.to(query_ND.dtype)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *(gradient * upstream[0] for gradient in ctx.saved_tensors), None, None)


def fused_sum(
    kernel: Kernel,
    query_ND: torch.Tensor,
    positive_ND: torch.Tensor,
    positive_bias_N: torch.Tensor,
    candidate_KD: torch.Tensor,
    candidate_bias_K: torch.Tensor,
    target_N: torch.Tensor,
    candidate_K: torch.Tensor,
) -> torch.Tensor:
    """Sum over examples of a loss of the target against shared candidates.

    Candidates equal to the example's target (accidental hits) are masked.

    Args:
        kernel: the loss and its gradients.
        query_ND: session queries.
        positive_ND, positive_bias_N: vector and bias of each target.
        candidate_KD, candidate_bias_K: of the shared candidates. For a softmax over K sampled ones pass
            `bias − log(K q)`: then their sum is an unbiased estimate of that over all other items (logQ
            correction; Bengio and Senécal 2008). With all items and plain biases it is the full softmax.
        target_N, candidate_K: their ids, to find accidental hits.
    """
    row, column = accidental_hits(target_N, candidate_K)
    return _Fused.apply(kernel, query_ND, positive_ND, positive_bias_N, candidate_KD, candidate_bias_K, row, column)


def accidental_hits(target_N: torch.Tensor, candidate_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (example, candidate index) with the same id, by sorting instead of `[N × K]` comparisons."""
    ordered, index = torch.sort(candidate_K)
    low = torch.searchsorted(ordered, target_N)
    count = torch.searchsorted(ordered, target_N, right=True) - low
    row = torch.repeat_interleave(torch.arange(len(target_N), device=target_N.device), count)
    first = torch.cumsum(count, 0) - count
    within = torch.arange(len(row), device=target_N.device) - first[row]
    return row, index[low[row] + within]


def candidate_scores(
    query_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    candidate_bias_K: torch.Tensor,
    target_N: torch.Tensor,
    candidate_K: torch.Tensor,
) -> torch.Tensor:
    """Scores `[N, K]` of shared candidates, `MASKED_SCORE` where a candidate is the example's own target.

    For losses that need each negative's score; `fused_sum` avoids this matrix.
    """
    score = torch.addmm(candidate_bias_K, query_ND, candidate_KD.t())
    row, column = accidental_hits(target_N, candidate_K)
    hit = torch.zeros_like(score, dtype=torch.bool)
    hit[row, column] = True
    return score.masked_fill(hit, MASKED_SCORE)


def softmax_of_scores(own_N: torch.Tensor, score_NK: torch.Tensor) -> torch.Tensor:
    """Sum over examples of −log softmax of the target among itself and the candidates."""
    logits_NK = torch.cat([own_N[:, None], score_NK], dim=1)
    return (torch.logsumexp(logits_NK, dim=1) - own_N).sum()


def _present(score_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores with 0 in place of `MASKED_SCORE`, the mask of negatives `[N, K]`, and their number per example `[N]`."""
    present = score_NK > MASKED_SCORE / 2
    return torch.where(present, score_NK, 0.0), present, present.sum(1).clamp(min=1)


def bpr_sum(own_N: torch.Tensor, score_NK: torch.Tensor) -> torch.Tensor:
    """BPR (Rendle et al. 2009; Hidasi et al. 2016): −log σ(own − score), the mean over negatives, summed."""
    score, present, count = _present(score_NK)
    each = torch.nn.functional.softplus(score - own_N[:, None]) * present
    return (each.sum(1) / count).sum()


def top1_sum(own_N: torch.Tensor, score_NK: torch.Tensor) -> torch.Tensor:
    """TOP1 (Hidasi et al. 2016): σ(score − own) + σ(score²), the mean over negatives, summed."""
    score, present, count = _present(score_NK)
    each = (torch.sigmoid(score - own_N[:, None]) + torch.sigmoid(score.square())) * present
    return (each.sum(1) / count).sum()


def bpr_max_sum(own_N: torch.Tensor, score_NK: torch.Tensor, regularisation: float) -> torch.Tensor:
    """BPR-max (Hidasi and Karatzoglou 2018) with its score regulariser, summed over examples.

    −log Σ_j s_j σ(own − score_j) + λ Σ_j s_j score_j², where s is the softmax over the negatives; 0 without any.
    """
    score, present, _ = _present(score_NK)
    weight = torch.softmax(score_NK, dim=1) * present
    above = (weight * torch.sigmoid(own_N[:, None] - score)).sum(1)
    each = regularisation * (weight * score.square()).sum(1) - torch.log(above + 1e-24)
    return (each * present.any(1)).sum()


def gbce_sum(own_N: torch.Tensor, score_NK: torch.Tensor, *, sampling_rate: float, t: float) -> torch.Tensor:
    """Generalised binary cross-entropy, gBCE (Petrov and Macdonald 2023), summed over examples.

    For each example, the mean over the positive and its negatives. The positive's probability is raised to
    β = α (t (1 − 1/α) + 1/α), which corrects the overconfidence from sampling only the share α of the
    negatives.
    """
    beta = sampling_rate * (t * (1.0 - 1.0 / sampling_rate) + 1.0 / sampling_rate)
    score, present, count = _present(score_NK)
    negative = (torch.nn.functional.softplus(score) * present).sum(1)
    positive = beta * torch.nn.functional.softplus(-own_N)
    return ((positive + negative) / (count + 1)).sum()


def embedding_sum(query_ND: torch.Tensor, positive_ND: torch.Tensor) -> torch.Tensor:
    """Sum over examples of 1 − cosine of query and target vector (Tan et al. 2016, embedding prediction).

    The target vector is detached: otherwise all vectors would collapse to one point with zero loss.
    """
    return (1.0 - torch.cosine_similarity(query_ND, positive_ND.detach(), dim=1)).sum()


def feedback_sum(logit_F: torch.Tensor, label_F: torch.Tensor, positive_weight: float = 1.0) -> torch.Tensor:
    """Sum over rows of the binary cross-entropy of a feedback task, with weighted positives."""
    weight = torch.where(label_F > 0, positive_weight, 1.0)
    return torch.nn.functional.binary_cross_entropy_with_logits(logit_F, label_F, weight, reduction="sum")
