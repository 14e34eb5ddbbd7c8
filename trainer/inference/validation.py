"""Validation on a fixed sample: exact full ranking and feedback AUCs, on all workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from etl.dataset import SPLITS, TRAIN_HOLDOUT, feedback_labels
from etl.runtime.arrays import IntArray
from retrieval.metrics.feedback import auc
from retrieval.metrics.ranking import RankingSums
from trainer.config import VALID_CUTOFFS
from trainer.data.batch import feedback_rows
from trainer.data.ranking_rows import FlatRows, RowReader
from trainer.data.reader import Reader, SessionReader, Sessions
from trainer.distributed.world import World
from trainer.inference.scorer import RankScorer, Scores, SessionScorer
from trainer.inference.target_ranks import RankRequest, exact_ranks, rank_request, ranks_by_owners

SESSIONS_PER_BATCH = 1024
ROWS_PER_BATCH = 16_384
DEVIATION_ITEMS = 1_000
"""Candidates, at even distances, that the deviation of scores is taken over."""
SPREAD = 8
"""A validation sample is drawn from row groups with this many times as many samples."""


def sample_groups(reader: Reader[Any], counts: IntArray, n: int) -> tuple[IntArray, np.random.Generator]:
    """Choose row groups with several times `n` validation samples, the same in every run on a dataset.

    Row groups are drawn first, so that a small sample of a large dataset reads few of them. A row group holds
    users with neighbouring ids, who are similar in real data, so the sample takes a part of many groups
    instead of a few complete ones.

    Args:
        reader: the dataset's reader.
        counts: int64, validation samples of each row group.
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
    """This worker's share of the `n` validation sessions."""
    groups, rng = sample_groups(reader, reader.group_rows, n)
    chosen = reader.read(groups)
    rows = np.sort(rng.permutation(len(chosen))[:n])
    return chosen.take(rows[world.global_rank :: world.size])


def valid_rows(reader: RowReader, n: int, world: World) -> FlatRows:
    """This worker's share of the `n` validation rows."""
    groups, rng = sample_groups(reader, reader.group_rows // 10, n)  # about a tenth of the rows are in valid
    chosen = reader.read(groups)
    row = np.flatnonzero(chosen.split == SPLITS.index("valid"))
    row = np.sort(rng.permutation(row)[:n])
    return chosen.take(row[world.global_rank :: world.size])


@dataclass
class Validation:
    """Result of one validation.

    Attributes:
        metrics: `hr@k`, `ndcg@k`, `mrr@k`, `auc/<task>`, `auc` (the mean over tasks), None where undefined.
        gates: mean weight of each expert by task.
        entropy: mean entropy of the gate by task, in nats.
        leads: share of states in which each expert has the largest weight, by task.
        mask_seen: whether seen items were excluded from the candidates; None for ranking models.
    """

    metrics: dict[str, float | None]
    gates: dict[str, list[float]] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)
    leads: dict[str, list[float]] = field(default_factory=dict)
    mask_seen: bool | None = None


class FeedbackSums:
    """Accumulates labels, scores and gate weights over batches."""

    def __init__(self, tasks: list[str]) -> None:
        self.labels: dict[str, list[Any]] = {task: [] for task in tasks}
        self.scores: dict[str, list[Any]] = {task: [] for task in tasks}
        self.gates: dict[str, Any] = {}

    def add_rows(self, feedback: Any, scores: Scores) -> None:
        """Add rows with their outcome bits and scores."""
        for task, score in scores.items():
            self.labels[task].append(feedback_labels(feedback, task))
            self.scores[task].append(score)

    def add_gates(self, gates: dict[str, Any]) -> None:
        """Add gate weights `[N, E]` by task."""
        for task, weight in gates.items():
            entropy = -(weight * np.log(np.maximum(weight, 1e-30))).sum()
            leads = np.bincount(weight.argmax(1), minlength=weight.shape[1])
            totals = np.concatenate([weight.sum(0), leads, [entropy, len(weight)]])
            self.gates[task] = self.gates.get(task, 0.0) + totals

    def merged(self, world: World, metrics: dict[str, float | None]) -> Validation:
        """Reduce over workers, and add AUCs to `metrics`."""
        for task in self.labels:
            pairs = world.gather((np.concatenate([*self.labels[task], []]), np.concatenate([*self.scores[task], []])))
            metrics[f"auc/{task}"] = auc(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
        if self.labels:
            aucs = [value for name, value in metrics.items() if name.startswith("auc/") and value is not None]
            metrics["auc"] = float(np.mean(aucs)) if aucs else None
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
    scorer: SessionScorer, sample: Sessions, candidate_C: IntArray, world: World, *, exposures: bool, mask_seen: bool
) -> Validation:
    """Rank each valid target among all candidates, as the evaluation does, and score its feedback rows.

    Args:
        scorer: the model.
        sample: this worker's sessions.
        candidate_C: dense ids of the candidates; with a sharded table those owned by this worker.
        world: the workers, over which sums and counts are reduced.
        exposures: whether feedback rows are the exposures.
        mask_seen: whether a query's input clicks are excluded from the candidates.
    """
    ranking, feedback = RankingSums(VALID_CUTOFFS), FeedbackSums(scorer.model.feedback_tasks)
    requests = []
    for sessions, visible in valid_batches(sample):
        state = scorer.states(sessions, visible[:, None])[:, 0]
        requests.append(TargetQueries.of(scorer, sessions, visible, state, mask_seen=mask_seen).request(scorer))
        feedback.add_gates(scorer.gates(state))
        if scorer.model.feedback_tasks:
            rows = feedback_rows(sessions, exposures=exposures)
            rows = rows.select(rows.position == visible[rows.session])
            feedback.add_rows(rows.feedback, scorer.feedback(state, rows))
    for ranks in _ranks(scorer, requests, candidate_C, world, "validation"):
        ranking.add(ranks)
    total = RankingSums(VALID_CUTOFFS)
    for other in world.gather(ranking):
        total.merge(other)
    return replace(feedback.merged(world, dict(total.averages())), mask_seen=mask_seen)


@dataclass(frozen=True)
class TargetQueries:
    """Queries of a batch of sessions before their valid clicks: what does not depend on the item vectors.

    Attributes:
        query_QD: queries.
        target_Q: int64, dense ids of the valid clicks.
        seen_2P: excluded (query, item) pairs; None = none.
        term_QI: sparse term added to the scores; None = not used.
    """

    query_QD: torch.Tensor
    target_Q: torch.Tensor
    seen_2P: torch.Tensor | None
    term_QI: Any

    @classmethod
    def of(
        cls, scorer: SessionScorer, sessions: Sessions, visible_B: IntArray, state_BS: torch.Tensor, *, mask_seen: bool
    ) -> TargetQueries:
        """From the states of sessions after their first `visible_B` clicks."""
        target = sessions.items.values[sessions.items.offset[:-1] + visible_B].astype(np.int64)
        seen = seen_pairs(sessions, visible_B) if mask_seen else None
        term = None if scorer.term is None else scorer.term.scores(sessions, visible_B, "valid")
        return cls(scorer.queries(state_BS), torch.from_numpy(target), seen, term)

    def request(self, scorer: SessionScorer) -> RankRequest:
        """The request to rank the targets by a scorer's item vectors."""
        return rank_request(scorer, self.query_QD, self.target_Q, self.seen_2P, self.term_QI)


def target_queries(scorer: SessionScorer, sample: Sessions, *, mask_seen: bool) -> list[TargetQueries]:
    """The queries of this worker's valid sessions, by batch."""
    queries = []
    for sessions, visible in valid_batches(sample):
        state = scorer.states(sessions, visible[:, None])[:, 0]
        queries.append(TargetQueries.of(scorer, sessions, visible, state, mask_seen=mask_seen))
    return queries


def target_ranks(
    scorer: SessionScorer, queries: list[TargetQueries], candidate_C: IntArray, world: World, what: str
) -> IntArray:
    """Ranks of all workers' valid targets, int64, as `validate_sessions` finds them. Collective.

    Args:
        scorer, candidate_C, world: as of `validate_sessions`.
        queries: this worker's.
        what: why, for the progress line.
    """
    mine = list(_ranks(scorer, [batch.request(scorer) for batch in queries], candidate_C, world, what))
    return np.concatenate([np.zeros(0, np.int64), *(ranks for share in world.gather(mine) for ranks in share)])


def score_deviation(scorer: SessionScorer, queries: list[TargetQueries], candidate_C: IntArray, world: World) -> float:
    """Root mean square, over valid queries, of the standard deviation of their scores over candidates. Collective.

    Args:
        scorer, world: as of `validate_sessions`; the last use of the scorer.
        queries: this worker's.
        candidate_C: dense ids of the candidates, the same on all workers.
    """
    chosen = torch.from_numpy(candidate_C[:: -(-len(candidate_C) // DEVIATION_ITEMS)]).to(scorer.device)
    vectors = scorer.item_vectors(chosen)
    scorer.finish()
    scores = [(batch.query_QD @ vectors.t()).double() for batch in queries]
    variances = [score.var(dim=1, correction=0).cpu().numpy() for score in scores]
    every = np.concatenate([np.zeros(0), *(variance for share in world.gather(variances) for variance in share)])
    return float(np.sqrt(every.mean())) if len(every) else 0.0


def valid_batches(sample: Sessions) -> Iterator[tuple[Sessions, IntArray]]:
    """Batches of sessions, with the number of their clicks before the valid target."""
    for begin in range(0, len(sample), SESSIONS_PER_BATCH):
        sessions = sample.take(np.arange(begin, min(begin + SESSIONS_PER_BATCH, len(sample))))
        yield sessions, sessions.items.lengths - TRAIN_HOLDOUT


def _ranks(
    scorer: SessionScorer, requests: list[RankRequest], candidate_C: IntArray, world: World, what: str
) -> Iterator[IntArray]:
    """Ranks of this worker's requests, shown as progress of `what`; the last use of the scorer."""
    done, total = 0, sum(len(request.target_Q) for request in requests)
    world.report(what, done, total, "sessions")
    candidates = torch.from_numpy(candidate_C.astype(np.int64)).to(scorer.device)
    local = scorer.local_shard_scorer()
    scorer.finish()
    if scorer.lookup:
        found = ranks_by_owners(local, requests, candidates, world)
    else:
        found = (exact_ranks(scorer, request, candidates) for request in requests)
    for ranks in found:
        done += len(ranks)
        world.report(what, done, total, "sessions")
        yield ranks


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


def seen_pairs(sessions: Sessions, visible_B: IntArray) -> torch.Tensor:
    """Session and item of every input click, int64 `[2, P]`."""
    items = sessions.items
    is_visible = items.index_in_row < np.repeat(visible_B, items.lengths)
    return torch.from_numpy(np.stack([items.row[is_visible], items.values[is_visible].astype(np.int64)]))
