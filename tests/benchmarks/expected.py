"""AUCs of a twin's test split in expectation over its labels.

A log of QB-video's size has about forty shares and forty follows in its test split: AUCs of drawn labels say little
about these. The process that made the log gives the probability of each action, so nothing need be drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from etl.dataset import Dataset
from etl.runtime.arrays import FloatArray, IntArray
from etl.twin.columns import scatter
from etl.twin.oracle import MIN_CLICKS, all_rows_score, score_rows
from etl.twin.raw_ids import item_ids, user_ids
from etl.twin.rows import chance_of, rows_of
from etl.twin.simulate import Clicks, Twin, simulate
from retrieval.bundle import open_bundle

ACTIONS = ("like", "share", "follow")
ORACLE_USERS = 4_000
"""Number of users over which the best possible is averaged."""


@dataclass(frozen=True)
class Truth:
    """A twin's users with the true probabilities of actions around their test clicks.

    Attributes:
        twin: the log.
        clicks: of all users.
        users: numbers of the retained users, ascending.
        user_id: int64, their raw ids.
    """

    twin: Twin
    clicks: Clicks
    users: npt.NDArray[np.int64]
    user_id: npt.NDArray[np.int64]

    @classmethod
    def of(cls, made: Twin) -> Truth:
        """The truth of a twin whose users are one chunk."""
        clicks = simulate(made, 0)
        users = np.flatnonzero(np.diff(clicks.offset) >= MIN_CLICKS)
        return cls(made, clicks, users, user_ids(made.scenario, made.users).of(users))

    def chance(self, task: str, user_R: IntArray, rank_R: IntArray, clicked_R: npt.NDArray[np.bool_]) -> FloatArray:
        """Probability of the action on rows of the test blocks, given all hidden variables.

        Args:
            task: the action.
            user_R: numbers of users.
            rank_R: items.
            clicked_R: whether the row is the user's test click.
        """
        taste, last = self.clicks.taste[user_R], self.clicks.offset[user_R + 1] - 1
        on_click = chance_of(self.twin, task, rank_R, taste, self.clicks.thread[last])
        return np.where(clicked_R, on_click, chance_of(self.twin, task, rank_R, taste, None))

    def of_bundle(self, path: Path, dataset: Dataset, tasks: Iterable[str] = ACTIONS) -> dict[str, float]:
        """Expected AUCs of a bundle's scores on the test blocks, keyed by the first two cells of a table's line.

        Args:
            path: the bundle.
            dataset: the dataset of the bundle.
            tasks: actions.
        """
        bundle, out = open_bundle(path), {}
        ranks = np.arange(self.twin.process.items)
        raw = item_ids(self.twin.scenario, len(ranks)).of(scatter(ranks, len(ranks)))
        rank_of_raw, user_order = np.argsort(raw), np.argsort(self.user_id)
        rank_of_item = rank_of_raw[np.searchsorted(raw, dataset.items()["item_id"].to_numpy(), sorter=rank_of_raw)]
        for task in tasks:
            columns = (bundle.feedback("test", task)[name] for name in ("user_id", "item", "clicked", "score"))
            user, item, clicked, score = (column.to_numpy(zero_copy_only=False) for column in columns)
            number = self.users[user_order[np.searchsorted(self.user_id, user, sorter=user_order)]]
            chance = self.chance(task, number, rank_of_item[item - 1], clicked)
            out[f"{task} | all rows"] = expected_auc(score, chance)
            out[f"{task} | given click"] = expected_auc(score[clicked], chance[clicked])
        return out

    def best(self) -> dict[str, float]:
        """The same for the exact probabilities given the history, which no model can beat except by chance."""
        users, table, out = self.users[:ORACLE_USERS], rows_of(self.twin, 0, self.clicks), {}
        tables = [score_rows(self.twin, self.clicks, table, users, held_out) for held_out in (1, 0)]
        row, clicked = (np.concatenate([part[name] for part in tables]) for name in ("row", "clicked"))
        scores = {name: np.concatenate([part["scores"][name] for part in tables]) for name in tables[0]["scores"]}
        for task in ACTIONS:
            chance = self.chance(task, table["user"][row], table["rank"][row], clicked)
            out[f"{task} | all rows"] = expected_auc(all_rows_score(scores, task), chance)
            out[f"{task} | given click"] = expected_auc(scores[task][clicked], chance[clicked])
        return out


def expected_auc(score_F: npt.NDArray[np.floating], chance_F: FloatArray) -> float:
    """Expected number of correctly ordered pairs of a positive and a negative row, over the expected number of pairs.

    Row i is positive with probability `chance_F[i]`, independently of the others; equal scores count half. With
    probabilities of 0 and 1 this is the AUC.

    >>> expected_auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0.0, 0.0, 1.0, 1.0]))
    0.75
    """
    _, level = np.unique(score_F, return_inverse=True)
    positive, negative = (np.bincount(level, weights=weight) for weight in (chance_F, 1.0 - chance_F))
    below = np.cumsum(negative) - negative
    with_itself = float(np.sum(chance_F * (1.0 - chance_F)))  # a row with itself: half in the ties, all in the product
    right = float(positive @ (below + negative / 2)) - with_itself / 2
    return right / (float(positive.sum() * negative.sum()) - with_itself)
