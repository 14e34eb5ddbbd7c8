"""Validation on a fixed sample of sessions: exact full ranking and feedback AUCs, on all workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from etl.contract import feedback_labels
from retrieval.metrics import RankingSums, auc
from trainer.data.batch import feedback_rows
from trainer.data.order import Int
from trainer.data.reader import SessionReader, Sessions
from trainer.scoring import Scorer
from trainer.world import World

CUTOFFS = [10, 20]
SESSIONS_PER_BATCH = 256
CHUNK_SCORES = 1 << 24
HELD_OUT = 2
"""The query for valid sees all kept clicks but the last two."""


def valid_sample(reader: SessionReader, n: int, world: World) -> Sessions:
    """This worker's share of the `n` sessions that are validated on, the same in every run on a dataset.

    Row groups are drawn first, so that a small sample of a large dataset reads few of them.
    """
    rng = np.random.default_rng(int(reader.dataset.manifest.fingerprint[:15], 16))
    groups: list[int] = []
    for group in rng.permutation(len(reader.groups)):
        if reader.group_rows[groups].sum() >= n:
            break
        groups.append(int(group))
    chosen = reader.read(np.array(sorted(groups)))
    rows = np.sort(rng.permutation(len(chosen))[:n])
    return chosen.take(rows[world.global_rank :: world.size])


@dataclass
class Validation:
    """What one validation found.

    Attributes:
        metrics: `hr@k`, `ndcg@k`, `mrr@k`, `auc/<task>`, None where undefined.
        gates: by task, the mean weight of each expert.
        entropy: by task, the mean entropy of the gate, in nats.
    """

    metrics: dict[str, float | None]
    gates: dict[str, list[float]] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)


def validate(scorer: Scorer, sample: Sessions, candidate_C: Int, world: World, *, exposures: bool) -> Validation:
    """Rank each valid target among all candidates, and score the rows of its block.

    Args:
        scorer: the model.
        sample: this worker's sessions.
        candidate_C: dense ids of the candidates.
        world: the workers, over which sums and counts are added.
        exposures: whether the rows are what was shown.
    """
    sums = RankingSums(CUTOFFS)
    tasks = scorer.model.feedback_tasks
    labels: dict[str, list[Any]] = {task: [] for task in tasks}
    scores: dict[str, list[Any]] = {task: [] for task in tasks}
    gates: dict[str, Any] = {}
    candidates = torch.from_numpy(candidate_C.astype(np.int64)).to(scorer.device)
    vectors = scorer.item_vectors()[candidates - 1]
    for begin in range(0, len(sample), SESSIONS_PER_BATCH):
        sessions = sample.take(np.arange(begin, min(begin + SESSIONS_PER_BATCH, len(sample))))
        visible = sessions.items.lengths - HELD_OUT
        state = scorer.states(sessions, visible)
        last = state[torch.arange(len(sessions)), torch.from_numpy(visible - 1)]
        target = sessions.items.values[sessions.items.offset[:-1] + visible]
        sums.add(exact_ranks(scorer.queries(last), vectors, candidates, torch.from_numpy(target.astype(np.int64))))
        for task, weight in scorer.gates(last).items():
            entropy = -(weight * np.log(np.maximum(weight, 1e-30))).sum()
            gates[task] = gates.get(task, 0.0) + np.concatenate([weight.sum(0), [entropy, len(weight)]])
        if tasks:
            rows = feedback_rows(sessions, exposures=exposures)
            rows = rows.select(rows.position == visible[rows.session])
            for task, score in scorer.feedback(state, rows).items():
                labels[task].append(feedback_labels(rows.feedback, task))
                scores[task].append(score)
    return _merge(world, sums, gates, labels, scores)


def _merge(
    world: World, sums: RankingSums, gates: dict[str, Any], labels: dict[str, list[Any]], scores: dict[str, list[Any]]
) -> Validation:
    total = RankingSums(CUTOFFS)
    for other in world.gather(sums):
        total.merge(other)
    metrics = total.averages()
    for task in labels:
        parts = world.gather((np.concatenate([*labels[task], []]), np.concatenate([*scores[task], []])))
        metrics[f"auc/{task}"] = auc(*(np.concatenate(side) for side in zip(*parts, strict=True)))
    merged: dict[str, Any] = {}
    for other in world.gather(gates):
        for task, values in other.items():
            merged[task] = merged.get(task, 0.0) + values
    mean = {task: values[:-1] / values[-1] for task, values in merged.items()}
    return Validation(
        metrics,
        {task: values[:-1].tolist() for task, values in mean.items()},
        {task: float(values[-1]) for task, values in mean.items()},
    )


@torch.inference_mode()
def exact_ranks(
    query_QD: torch.Tensor, vector_CD: torch.Tensor, candidate_C: torch.Tensor, target_Q: torch.Tensor
) -> Int:
    """Rank of each target among all candidates, ties against it, blocks of candidates at a time."""
    target_Q = target_Q.to(query_QD.device)
    row = torch.searchsorted(candidate_C, target_Q)
    own = (query_QD * vector_CD[row]).sum(1)
    rank = torch.ones_like(target_Q)
    step = max(1, CHUNK_SCORES // max(len(query_QD), 1))
    for begin in range(0, len(vector_CD), step):
        score = query_QD @ vector_CD[begin : begin + step].t()
        inside = (row >= begin) & (row < begin + step)
        # The same product in another shape may differ in its last bit: the target is left out by id.
        score[inside, row[inside] - begin] = -torch.inf
        rank += (score >= own[:, None]).sum(1)
    return rank.cpu().numpy()
