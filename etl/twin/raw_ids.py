"""Raw ids of a twin scaled to a number of users: its own, and those shared between logs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etl.logs.tenrec_published import PUBLISHED
from etl.runtime.arrays import IntArray

OWN_IDS = {"qk_video": 0, "qk_article": 1, "qb_video": 2, "qb_article": 3}
"""Start of each log's own id range, as a multiple of `ID_RANGE`."""
ID_RANGE = 100_000_000


@dataclass(frozen=True)
class Ids:
    """Raw ids of a twin's users or items: the first `shared` of them are QK-video's, the rest its own."""

    shared: int
    first_shared: int
    own: int

    def of(self, number_N: IntArray) -> IntArray:
        """Raw ids of indices from 0."""
        return np.where(number_N < self.shared, self.first_shared + number_N, self.own + number_N)


def user_ids(scenario: str, users: int) -> Ids:
    """Raw ids of users: each log shares a different range of QK-video's users, scaled from the published number."""
    published = PUBLISHED[scenario]
    scale = users / published.users
    before = sum(PUBLISHED[other].shared_users for other in list(OWN_IDS)[: OWN_IDS[scenario]])
    return Ids(round(published.shared_users * scale), 1 + round(before * scale), 1 + OWN_IDS[scenario] * ID_RANGE)


def item_ids(scenario: str, items: int) -> Ids:
    """Raw ids of items, likewise."""
    published = PUBLISHED[scenario]
    return Ids(round(published.shared_items * items / published.items), 1, 1 + OWN_IDS[scenario] * ID_RANGE)
