"""Weights of the counted transitions in a trained model's scores, fitted on validation sessions.

Trained jointly with the vectors these weights come out too small: the vectors have fitted the training clicks, so that
counts seem to add little. The valid clicks are new to both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from etl.dataset import Dataset
from etl.runtime.arrays import IntArray
from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from etl.runtime.lookup import lookup
from retrieval.blend.fitted import FOLDS, fold_of
from retrieval.bundle_folder import SEARCH_FOLDER
from retrieval.ragged import index_in_group
from retrieval.sources.sparse_rows import entries_at
from retrieval.transitions import Transitions, last_clicks, open_transitions
from trainer.data.reader import Sessions

WEIGHTS = "transition_weights.json"
"""File of the weights in a run folder."""
NEAREST = 100
"""Number of best candidates by inner product that compete with the counted ones."""
ITERATIONS = 60
CHUNK_SCORES = 1 << 24
RIDGE = 1e-3
"""L2 penalty on the slopes, so that a few sessions do not decide the weights of rare items."""

ScoreOf = Callable[[IntArray], npt.NDArray[np.float32]]
"""Inner products `[Q, c]` of all queries with items `[c]`."""


@dataclass(frozen=True)
class TermWeights:
    """Weights of T terms as a function of the train clicks of the last clicked item.

    w_t = size × softplus(bias_t + slope_t s), s = `log_scaled_clicks` of the item's clicks.

    Attributes:
        size: scale; 0 = no term.
        bias, slope: of each term.
    """

    size: float
    bias: tuple[float, ...]
    slope: tuple[float, ...]

    def weights(self, click_N: IntArray) -> npt.NDArray[np.float64]:
        """Float64 `[N, T]`, at least 0.

        >>> TermWeights(2.0, (0.0, -1e3), (1.0, 0.0)).weights(np.array([19])).round(3).tolist()
        [[1.385, 0.0]]
        """
        logit = np.array(self.bias) + np.outer(log_scaled_clicks(click_N), self.slope)
        return self.size * np.logaddexp(0.0, logit)


def log_scaled_clicks(click_N: IntArray) -> npt.NDArray[np.float64]:
    """Log-scaled click counts: about -1 (none) to 2 (ten thousand)."""
    return np.log1p(click_N) / 3.0 - 1.0


@dataclass(frozen=True)
class TransitionTerm:
    """Transition counts and their weights.

    Attributes:
        transitions: counted on the clicks that the model was trained on.
        clicks: train clicks of items 1..n_items `[n_items]`.
        all_users: fitted on all valid sessions; used for test and next.
        folds: fitted without the users of each fold (cross-fitting); used for their valid queries.
    """

    transitions: Transitions
    clicks: IntArray
    all_users: TermWeights
    folds: tuple[TermWeights, ...]

    def weights(self, sessions: Sessions, visible_B: IntArray, split: str) -> npt.NDArray[np.float32]:
        """Weights `[B, T]` after the first `visible_B` (at least 1) clicks of sessions."""
        last = self.clicks[sessions.items.values[sessions.items.offset[:-1] + visible_B - 1] - 1]
        if split != "valid":
            return self.all_users.weights(last).astype(np.float32)
        by_fold = np.stack([fitted.weights(last) for fitted in self.folds])
        return by_fold[fold_of(sessions.user_id), np.arange(len(last))].astype(np.float32)

    def scores(self, sessions: Sessions, visible_B: IntArray, split: str) -> sparse.csr_matrix:
        """Term added to the item scores after the first `visible_B` clicks, float64 `[B, n_items + 1]`."""
        return self.transitions.scores(contexts(sessions, visible_B), self.weights(sessions, visible_B, split))

    def without(self) -> TransitionTerm:
        """A copy with all weights 0."""
        all_users, *folds = (replace(fitted, size=0.0) for fitted in (self.all_users, *self.folds))
        return replace(self, all_users=all_users, folds=tuple(folds))

    @property
    def is_used(self) -> bool:
        """Whether any weight is above 0."""
        return self.all_users.size > 0

    def write(self, run: Path) -> None:
        """Save the weights in the run, to score other data later."""
        folds = [asdict(fitted) for fitted in self.folds]
        write_json(run / WEIGHTS, {"everyone": asdict(self.all_users), "folds": folds})

    @classmethod
    def read(cls, run: Path, transitions: Transitions, clicks: IntArray) -> TransitionTerm:
        """Read the weights saved by `write`.

        Raises:
            InputError: they were written by an earlier version, or are damaged.
        """
        try:
            saved = json.loads((run / WEIGHTS).read_text())
            fitted = [
                TermWeights(values["size"], tuple(values["bias"]), tuple(values["slope"]))
                for values in (saved["everyone"], *saved["folds"])
            ]
        except (TypeError, ValueError, KeyError):
            hint = "train it again with this version"
            raise InputError("weights with size, bias and slope", run / WEIGHTS, hint) from None
        return cls(transitions.first(len(fitted[0].bias)), clicks, fitted[0], tuple(fitted[1:]))


def count(dataset: Dataset, run: Path, holdout: int) -> Transitions:
    """Count the transitions of the training clicks and save them in the run."""
    return open_transitions(dataset, run / SEARCH_FOLDER, holdout, torch.get_num_threads())


def contexts(sessions: Sessions, visible_B: IntArray) -> IntArray:
    """The last clicks of each session's first `visible_B` clicks, latest first."""
    return last_clicks(sessions.items.values, sessions.items.offset[:-1] + visible_B, visible_B)


@dataclass(frozen=True)
class TermCandidates:
    """N candidates of Q queries, by query.

    Attributes:
        query: int64 `[N]`, sorted.
        score: float64 `[N]`, by inner product.
        feature: float64 `[N, T]`, unweighted terms.
        is_target: `[N]`.
        user_id, last_clicks: int64 `[Q]`, the user, and the train clicks of the last clicked item.
    """

    query: IntArray
    score: npt.NDArray[np.float64]
    feature: npt.NDArray[np.float64]
    is_target: npt.NDArray[np.bool_]
    user_id: IntArray
    last_clicks: IntArray

    @classmethod
    def joined(cls, parts: list[TermCandidates]) -> TermCandidates:
        """Concatenate the candidates of several batches of queries."""
        first = np.cumsum([0, *(len(part.user_id) for part in parts[:-1])])
        query = np.concatenate([part.query + begin for part, begin in zip(parts, first, strict=True)])
        names = ("score", "feature", "is_target", "user_id", "last_clicks")
        return cls(query, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def find_candidates(
    transitions: Transitions,
    clicks: IntArray,
    context_QG: IntArray,
    user_id_Q: IntArray,
    target_Q: IntArray,
    score_of: ScoreOf,
    candidate_C: IntArray,
    seen: tuple[IntArray, IntArray] | None,
) -> TermCandidates:
    """The candidates for fitting weights: the best by inner product, and all with a count.

    Args:
        transitions: the counts.
        clicks: train clicks of items 1..n_items `[n_items]`.
        context_QG: the last clicks of each query.
        user_id_Q, target_Q: user and target of each query.
        score_of: returns inner products.
        candidate_C: dense ids of the candidates, sorted.
        seen: excluded (query, item) pairs; None = none.
    """
    n = len(user_id_Q)
    score, item = nearest(n, score_of, candidate_C, seen)
    key = [(np.arange(n)[:, None] << 32 | item)[np.isfinite(score)]]
    features = transitions.features(context_QG)
    for feature in features:
        query = np.repeat(np.arange(n), np.diff(feature.indptr))
        key.append(query << 32 | feature.indices.astype(np.int64))
    pair = np.unique(np.concatenate(key))
    usable = lookup(candidate_C, pair & 0xFFFFFFFF)[1]
    if seen is not None:
        usable &= ~np.isin(pair, seen[0] << 32 | seen[1])
    pair = pair[usable]
    query, item = pair >> 32, pair & 0xFFFFFFFF
    products = pair_scores(score_of, query, item)
    feature = np.stack([entries_at(matrix, query, item) for matrix in features], axis=1)
    return TermCandidates(query, products, feature, item == target_Q[query], user_id_Q, clicks[context_QG[:, 0] - 1])


def nearest(
    n: int, score_of: ScoreOf, candidate_C: IntArray, seen: tuple[IntArray, IntArray] | None
) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Scores and items of the best candidates of `n` queries `[n, NEAREST]`, best first; -inf beyond the last."""
    best, ids = np.full((n, NEAREST), -np.inf, np.float32), np.zeros((n, NEAREST), np.int64)
    begin, largest = 0, max(NEAREST, CHUNK_SCORES // max(n, 1))
    while begin < len(candidate_C):
        # Chunks grow, since few later scores exceed the current worst of the list.
        item = candidate_C[begin : begin + min(largest, max(begin, NEAREST))]
        begin += len(item)
        score = score_of(item)
        if seen is not None:
            column, inside = lookup(item, seen[1])
            score[seen[0][inside], column[inside]] = -np.inf
        query, column = np.nonzero(score > best[:, -1:])
        every = np.concatenate([np.repeat(np.arange(n), NEAREST), query])
        score_N, item_N = np.append(best, score[query, column]), np.append(ids, item[column])
        order = np.lexsort((-score_N, every))
        length = NEAREST + np.bincount(query, minlength=n)
        nearest = order[index_in_group(length) < NEAREST].reshape(n, NEAREST)
        best, ids = score_N[nearest], item_N[nearest]
    return best, ids


def pair_scores(score_of: ScoreOf, query_N: IntArray, item_N: IntArray) -> npt.NDArray[np.float64]:
    """Inner products of (query, item) pairs, computed in blocks of distinct items."""
    items, column = np.unique(item_N, return_inverse=True)
    out = np.empty(len(item_N))
    order = np.argsort(column, kind="stable")
    step = 1 << 12
    bounds = np.searchsorted(column[order], np.arange(0, len(items) + step, step))
    for block, (low, high) in enumerate(pairwise(bounds)):
        chosen = order[low:high]
        if len(chosen):
            score = score_of(items[block * step : (block + 1) * step])
            out[chosen] = score[query_N[chosen], column[chosen] - block * step]
    return out


def fit_term_weights(candidates: TermCandidates) -> tuple[TermWeights, tuple[TermWeights, ...]]:
    """The weights fitted on all users, and those without the users of each fold."""
    fold = fold_of(candidates.user_id)
    all_users = minimise(candidates, np.ones(len(fold), bool))
    return all_users, tuple(minimise(candidates, fold != left_out) for left_out in range(FOLDS))


def minimise(candidates: TermCandidates, chosen_Q: npt.NDArray[np.bool_]) -> TermWeights:
    """Minimise the mean −log softmax of the targets among the candidates of the chosen queries.

    The scale of the scores (inner products need not be logits) is fitted too; weights are in units of the scores.
    """
    n_terms = candidates.feature.shape[1]
    nothing = TermWeights(0.0, (0.0,) * n_terms, (0.0,) * n_terms)
    has_target = np.zeros(len(chosen_Q), bool)
    has_target[candidates.query[candidates.is_target]] = True
    row = (chosen_Q & has_target)[candidates.query]
    if not row.any():
        return nothing
    query, number = np.unique(candidates.query[row], return_inverse=True)
    segment, n = torch.from_numpy(number), len(query)
    score, feature = torch.from_numpy(candidates.score[row]), torch.from_numpy(candidates.feature[row])
    target = torch.from_numpy(np.flatnonzero(candidates.is_target[row]))
    often = torch.from_numpy(log_scaled_clicks(candidates.last_clicks[query]))[:, None]
    parameter = torch.zeros(1 + 2 * n_terms, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameter], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scale, (bias, slope) = parameter[0].exp(), parameter[1:].view(2, n_terms)
        weight = torch.nn.functional.softplus(bias + often * slope)
        logit = scale * score + (feature * weight[segment]).sum(1)
        top = torch.full((n,), -torch.inf, dtype=torch.float64).scatter_reduce(0, segment, logit.detach(), "amax")
        total = torch.zeros(n, dtype=torch.float64).index_add(0, segment, (logit - top[segment]).exp())
        mean = (total.log() + top).mean() - logit[target].mean() + RIDGE * slope.square().sum()
        mean.backward()
        return mean

    optimizer.step(loss)
    values = parameter.detach().numpy()
    size, (bias, slope) = float(np.exp(-values[0])), values[1:].reshape(2, n_terms)
    fitted = TermWeights(size, tuple(bias.tolist()), tuple(slope.tolist()))
    return fitted if np.isfinite([size, *values]).all() else nothing
