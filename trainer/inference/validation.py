"""Validation on a fixed sample: exact full ranking and feedback AUCs, on all workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from etl.dataset import SPLITS, TRAIN_HOLDOUT, feedback_labels
from retrieval.metrics.feedback import auc
from retrieval.metrics.ranking import MISS, RankingSums
from trainer.config import VALID_CUTOFFS
from trainer.data.batch import feedback_rows
from trainer.data.order import Int
from trainer.data.ranking_rows import FlatRows, RowReader
from trainer.data.reader import Reader, SessionReader, Sessions
from trainer.distributed.world import World
from trainer.inference.scorer import RankScorer, Scores, SessionScorer

if TYPE_CHECKING:
    from scipy import sparse

SESSIONS_PER_BATCH = 1024
ROWS_PER_BATCH = 16_384
CHUNK_SCORES = 1 << 24
SPREAD = 8
"""A validation sample is drawn from the row groups of so many times as many samples."""


def sample_groups(reader: Reader[Any], counts: Int, n: int) -> tuple[Int, np.random.Generator]:
    """Row groups with several times `n` samples to validate on, the same in every run on a dataset.

    Row groups are drawn first, so that a small sample of a large dataset reads few of them. A row group holds
    users with neighbouring ids, who are alike in real data: the sample takes a part of many groups, never
    a few groups whole.

    Args:
        reader: of the dataset.
        counts: int64, samples to validate on of each row group.
        n: number of samples.
    """
    rng = np.random.default_rng(int(reader.dataset.manifest.fingerprint[:15], 16))
    groups: list[int] = []
    for group in rng.permutation(len(reader.groups)):
        if counts[groups].sum() >= SPREAD * n:
            break
        groups.append(int(group))
    return np.array(sorted(groups)), rng


def valid_sessions(reader: SessionReader, n: int, world: World) -> Sessions:
    """This worker's share of the `n` sessions that are validated on."""
    groups, rng = sample_groups(reader, reader.group_rows, n)
    chosen = reader.read(groups)
    rows = np.sort(rng.permutation(len(chosen))[:n])
    return chosen.take(rows[world.global_rank :: world.size])


def valid_rows(reader: RowReader, n: int, world: World) -> FlatRows:
    """This worker's share of `n` rows of the split valid."""
    groups, rng = sample_groups(reader, reader.group_rows // 10, n)  # a tenth of the rows is valid
    chosen = reader.read(groups)
    row = np.flatnonzero(chosen.split == SPLITS.index("valid"))
    row = np.sort(rng.permutation(row)[:n])
    return chosen.take(row[world.global_rank :: world.size])


@dataclass
class Validation:
    """Result of one validation.

    Attributes:
        metrics: `hr@k`, `ndcg@k`, `mrr@k`, `auc/<task>`, `auc` (the mean over tasks), None where undefined.
        gates: by task, the mean weight of each expert.
        entropy: by task, the mean entropy of the gate, in nats.
        leads: by task, the share of states in which each expert has the largest weight.
        mask_seen: whether seen items were no candidates; None where nothing is retrieved.
    """

    metrics: dict[str, float | None]
    gates: dict[str, list[float]] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)
    leads: dict[str, list[float]] = field(default_factory=dict)
    mask_seen: bool | None = None


class FeedbackSums:
    """Collects labels, scores and gate weights of rows batch by batch."""

    def __init__(self, tasks: list[str]) -> None:
        self.labels: dict[str, list[Any]] = {task: [] for task in tasks}
        self.scores: dict[str, list[Any]] = {task: [] for task in tasks}
        self.gates: dict[str, Any] = {}

    def add_rows(self, feedback: Any, scores: Scores) -> None:
        """Rows with their outcome bits and scores."""
        for task, score in scores.items():
            self.labels[task].append(feedback_labels(feedback, task))
            self.scores[task].append(score)

    def add_gates(self, gates: dict[str, Any]) -> None:
        """Gate weights `[N, E]` by task."""
        for task, weight in gates.items():
            entropy = -(weight * np.log(np.maximum(weight, 1e-30))).sum()
            leads = np.bincount(weight.argmax(1), minlength=weight.shape[1])
            totals = np.concatenate([weight.sum(0), leads, [entropy, len(weight)]])
            self.gates[task] = self.gates.get(task, 0.0) + totals

    def merged(self, world: World, metrics: dict[str, float | None]) -> Validation:
        """The validation over all workers, with AUCs added to `metrics`."""
        for task in self.labels:
            pairs = world.gather((np.concatenate([*self.labels[task], []]), np.concatenate([*self.scores[task], []])))
            metrics[f"auc/{task}"] = auc(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
        if self.labels:
            result = [value for name, value in metrics.items() if name.startswith("auc/") and value is not None]
            metrics["auc"] = float(np.mean(result)) if result else None
        merged: dict[str, Any] = {}
        for other in world.gather(self.gates):
            for task, values in other.items():
                merged[task] = merged.get(task, 0.0) + values
        mean = {task: values[:-1] / values[-1] for task, values in merged.items()}
        shares = {task: np.split(values[:-1], 2) for task, values in mean.items()}
        return Validation(
            metrics,
            gates={task: weight.tolist() for task, (weight, _) in shares.items()},
            entropy={task: float(values[-1]) for task, values in mean.items()},
            leads={task: lead.tolist() for task, (_, lead) in shares.items()},
        )


def validate_sessions(
    scorer: SessionScorer, sample: Sessions, candidate_C: Int, world: World, *, exposures: bool, mask_seen: bool
) -> Validation:
    """Rank each valid target among all candidates as the evaluation does, and score the rows of its block.

    Args:
        scorer: the model.
        sample: this worker's sessions.
        candidate_C: dense ids of the candidates.
        world: the workers, over which sums and counts are added.
        exposures: whether the rows are what was shown.
        mask_seen: whether the clicks that a query sees are no candidates.
    """
    ranking, feedback = RankingSums(VALID_CUTOFFS), FeedbackSums(scorer.model.feedback_tasks)
    candidates = torch.from_numpy(candidate_C.astype(np.int64)).to(scorer.device)
    for begin in range(0, len(sample), SESSIONS_PER_BATCH):
        sessions = sample.take(np.arange(begin, min(begin + SESSIONS_PER_BATCH, len(sample))))
        visible = sessions.items.lengths - TRAIN_HOLDOUT
        state = scorer.states(sessions, visible[:, None])[:, 0]
        target = sessions.items.values[sessions.items.offset[:-1] + visible]
        seen = seen_pairs(sessions, visible) if mask_seen else None
        targets = torch.from_numpy(target.astype(np.int64))
        term = None if scorer.term is None else scorer.term.scores(sessions, visible, "valid")
        ranking.add(exact_ranks(scorer, scorer.queries(state), candidates, targets, seen, term))
        feedback.add_gates(scorer.gates(state))
        if scorer.model.feedback_tasks:
            rows = feedback_rows(sessions, exposures=exposures)
            rows = rows.select(rows.position == visible[rows.session])
            feedback.add_rows(rows.feedback, scorer.feedback(state, rows))
    total = RankingSums(VALID_CUTOFFS)
    for other in world.gather(ranking):
        total.merge(other)
    return replace(feedback.merged(world, dict(total.averages())), mask_seen=mask_seen)


def validate_rows(scorer: RankScorer, rows: FlatRows, world: World) -> Validation:
    """Score rows with a ranking model.

    Args:
        scorer: the model.
        rows: this worker's rows.
        world: the workers.
    """
    feedback = FeedbackSums(scorer.model.feedback_tasks)
    for begin in range(0, len(rows), ROWS_PER_BATCH):
        part = rows.take(np.arange(begin, min(begin + ROWS_PER_BATCH, len(rows))))
        feature = scorer.features(part)
        feedback.add_gates(scorer.gates(feature))
        feedback.add_rows(part.feedback, scorer.feedback(feature))
    return feedback.merged(world, {})


def seen_pairs(sessions: Sessions, visible_B: Int) -> torch.Tensor:
    """Session and item of every click that a query sees, int64 `[2, P]`."""
    items = sessions.items
    is_visible = items.place < np.repeat(visible_B, items.lengths)
    return torch.from_numpy(np.stack([items.row[is_visible], items.values[is_visible].astype(np.int64)]))


@torch.inference_mode()
def exact_ranks(
    scorer: SessionScorer,
    query_QD: torch.Tensor,
    candidate_C: torch.Tensor,
    target_Q: torch.Tensor,
    seen_2P: torch.Tensor | None = None,
    term_QI: sparse.csr_matrix | None = None,
) -> Int:
    """Rank of each target among all candidates, int64 `[Q]`; ties and NaN count against it.

    Candidates are gathered and multiplied a block at a time: a copy of a large catalogue would double the memory.

    Args:
        scorer: gives the candidates' vectors.
        query_QD: queries.
        candidate_C: dense ids of the candidates, rising.
        target_Q: dense ids of the targets, all of them candidates.
        seen_2P: query and item of pairs that are no candidates; a target among them is a miss.
        term_QI: what is added to the scores of some items.
    """
    target_Q = target_Q.to(query_QD.device)
    row = torch.searchsorted(candidate_C, target_Q)
    own = (query_QD * scorer.item_vectors(target_Q)).sum(1)
    added = None
    if term_QI is not None:
        query, column, value = added = tuple(part.to(own.device) for part in _entries(term_QI, candidate_C))
        is_target = column == row[query]
        own.index_add_(0, query[is_target], value[is_target])
    rank = torch.ones_like(target_Q)
    query, item = torch.zeros_like(target_Q[:0]).expand(2, 0) if seen_2P is None else seen_2P.to(query_QD.device)
    rank[query[item == target_Q[query]]] = MISS // 2  # leaves room for what is counted on top
    index = torch.searchsorted(candidate_C, item)
    known = candidate_C[index.clamp(max=len(candidate_C) - 1)] == item
    step = max(1, CHUNK_SCORES // max(len(query_QD), 1))
    for begin in range(0, len(candidate_C), step):
        score = query_QD @ scorer.item_vectors(candidate_C[begin : begin + step]).t()
        if added is not None:
            chosen = (added[1] >= begin) & (added[1] < begin + step)
            cell = (added[0][chosen], added[1][chosen] - begin)
            score.index_put_(cell, added[2][chosen], accumulate=True)
        inside = (row >= begin) & (row < begin + step)
        # The same product in another shape may differ in its last bit: the target is left out by id.
        score[inside, row[inside] - begin] = -torch.inf
        masked = known & (index >= begin) & (index < begin + step)
        score[query[masked], index[masked] - begin] = -torch.inf
        rank += (~(score < own[:, None])).sum(1)
    rank[~torch.isfinite(own)] = MISS
    return rank.cpu().numpy()


def _entries(term_QI: sparse.csr_matrix, candidate_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, index among the candidates and value of the term's entries."""
    query_E = np.repeat(np.arange(term_QI.shape[0]), np.diff(term_QI.indptr))
    arrays = (query_E, term_QI.indices.astype(np.int64), term_QI.data.astype(np.float32))
    query, item, value = (torch.from_numpy(values).to(candidate_C.device) for values in arrays)
    column = torch.searchsorted(candidate_C, item).clamp(max=len(candidate_C) - 1)
    known = candidate_C[column] == item
    return query[known], column[known], value[known]
