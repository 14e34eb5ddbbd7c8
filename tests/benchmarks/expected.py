"""AUCs of a twin's test split in expectation over its labels.

A log of QB-video's size has some forty shares and forty follows in its test split: AUCs of drawn labels say next to
nothing about these. The process that made the log tells how likely each action was, so nothing need be drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from etl.twin.generate import Clicks, Twin, rows_of, simulate
from etl.twin.oracle import MIN_CLICKS, beliefs, score_rows
from etl.twin.scenarios import user_ids
from retrieval.bundle import open_bundle

Float = npt.NDArray[np.float64]
ACTIONS = ("like", "share", "follow")
ORACLE_USERS = 4_000
"""Users that the best possible is averaged over."""


@dataclass(frozen=True)
class Truth:
    """A twin's users with what was bound to happen to each one's test click.

    Attributes:
        twin: the log.
        clicks: of all users.
        users: numbers of those that are kept, rising.
        user_id: int64, their raw ids.
    """

    twin: Twin
    clicks: Clicks
    users: npt.NDArray[np.int64]
    user_id: npt.NDArray[np.int64]

    @classmethod
    def of(cls, made: Twin) -> Truth:
        """Of a twin whose users are one chunk."""
        clicks = simulate(made, 0)
        users = np.flatnonzero(np.diff(clicks.offset) >= MIN_CLICKS)
        return cls(made, clicks, users, user_ids(made.scenario, made.users).of(users))

    def chance(self, task: str) -> Float:
        """Probability of the action on each kept user's last click, given all that is hidden."""
        last = self.clicks.offset[self.users + 1] - 1
        logit = self.twin.process.logits(
            task, self.clicks.rank[last], self.clicks.taste[self.users], self.clicks.thread[last]
        )
        return np.asarray(1.0 / (1.0 + np.exp(-logit)), np.float64)

    def of_bundle(self, path: Path, tasks: Iterable[str] = ACTIONS) -> dict[str, float]:
        """Expected AUCs of a bundle's scores on the test blocks, by a table's first two cells."""
        bundle, order, out = open_bundle(path), np.argsort(self.user_id), {}
        for task in tasks:
            columns = (bundle.feedback("test", task)[name] for name in ("user_id", "clicked", "score"))
            user, clicked, score = (column.to_numpy(zero_copy_only=False) for column in columns)
            chance = self.chance(task)[order[np.searchsorted(self.user_id, user, sorter=order)]]
            out[f"{task} | all rows"] = expected_auc(score, np.where(clicked, chance, 0.0))
            out[f"{task} | given click"] = expected_auc(score[clicked], chance[clicked])
        return out

    def best(self) -> dict[str, float]:
        """The same of the exact probabilities given the history, which no model can outdo but by chance."""
        users = self.users[:ORACLE_USERS]
        belief, recent = beliefs(self.twin.process, self.clicks, users)
        found = score_rows(self.twin, self.clicks, rows_of(self.twin, 0), users, belief, recent)
        score, clicked, out = found["scores"], found["clicked"], {}
        for task in ACTIONS:
            # A test block ends in its only click: clicked rows are the users in their order.
            chance = np.zeros(len(clicked))
            chance[clicked] = self.chance(task)[: len(users)]
            out[f"{task} | all rows"] = expected_auc(score[task] * score["click"], chance)
            out[f"{task} | given click"] = expected_auc(score[task][clicked], chance[clicked])
        return out


def expected_auc(score_F: npt.NDArray[np.floating], chance_F: Float) -> float:
    """Expected pairs of a positive and a negative row that scores put right, over the expected number of pairs.

    Row i is positive with probability `chance_F[i]`, independently of the others; equal scores count half. Chances of
    0 and 1 give the AUC.

    >>> expected_auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0.0, 0.0, 1.0, 1.0]))
    0.75
    """
    _, level = np.unique(score_F, return_inverse=True)
    positive, negative = (np.bincount(level, weights=weight) for weight in (chance_F, 1.0 - chance_F))
    below = np.cumsum(negative) - negative
    with_itself = float(np.sum(chance_F * (1.0 - chance_F)))  # half of it in the ties, all of it in the product
    right = float(positive @ (below + negative / 2)) - with_itself / 2
    return right / (float(positive.sum() * negative.sum()) - with_itself)
