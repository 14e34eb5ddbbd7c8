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

from etl.dataset import Dataset
from etl.twin.columns import scatter
from etl.twin.oracle import MIN_CLICKS, all_rows_score, score_rows
from etl.twin.rows import chance_of, rows_of
from etl.twin.scenarios import item_ids, user_ids
from etl.twin.simulate import Clicks, Twin, simulate
from retrieval.bundle import open_bundle

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
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

    def chance(self, task: str, user_R: Int, rank_R: Int, clicked_R: npt.NDArray[np.bool_]) -> Float:
        """Probability of the action on rows of the test blocks, given all that is hidden.

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
        """Expected AUCs of a bundle's scores on the test blocks, by a table's first two cells.

        Args:
            path: the bundle.
            dataset: that the bundle was made from.
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
        """The same of the exact probabilities given the history, which no model can outdo but by chance."""
        users, table, out = self.users[:ORACLE_USERS], rows_of(self.twin, 0, self.clicks), {}
        tables = [score_rows(self.twin, self.clicks, table, users, held_out) for held_out in (1, 0)]
        row, clicked = (np.concatenate([part[name] for part in tables]) for name in ("row", "clicked"))
        scores = {name: np.concatenate([part["scores"][name] for part in tables]) for name in tables[0]["scores"]}
        for task in ACTIONS:
            chance = self.chance(task, table["user"][row], table["rank"][row], clicked)
            out[f"{task} | all rows"] = expected_auc(all_rows_score(scores, task), chance)
            out[f"{task} | given click"] = expected_auc(scores[task][clicked], chance[clicked])
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
