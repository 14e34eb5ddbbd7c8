"""The published sizes of the four logs, and how a twin is scaled to a number of users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etl.protocol import Int


@dataclass(frozen=True)
class Published:
    """Totals of a log as the Tenrec paper gives them (Yuan et al. 2022), None where it has no such column."""

    users: int
    items: int
    exposures: int
    clicks: int
    likes: int | None
    shares: int | None
    follows: int | None
    reads: int | None = None
    favorites: int | None = None
    shared_users: int = 0
    shared_items: int = 0

    def rate(self, action: str) -> float:
        """Share of clicks with an action; 0 where the log has no such column."""
        total = {
            "like": self.likes,
            "share": self.shares,
            "follow": self.follows,
            "read": self.reads,
            "favorite": self.favorites,
        }[action]
        return (total or 0) / self.clicks


# The articles' clicks are what was shown and opened; unclicked exposures are published for videos alone,
# so articles take the exposures of one skipped row a click.
PUBLISHED = {
    "qk_video": Published(5_022_750, 3_753_436, 493_458_970, 142_321_193, 10_141_195, 1_128_312, 857_678),
    "qb_video": Published(
        34_240, 130_637, 2_422_299, 1_701_171, 29_687, 2_541, 2_487, shared_users=3_261, shared_items=78_482
    ),
    "qk_article": Published(
        1_325_838,
        220_122,
        2 * 46_111_728,
        46_111_728,
        821_888,
        591_834,
        62_239,
        44_228_593,
        316_627,
        shared_users=269_207,
    ),
    "qb_article": Published(24_516, 7_355, 2 * 348_736, 348_736, None, None, None, shared_users=58),
}
"""`shared_users` and `shared_items` are those that a log has in common with QK-video."""

OWN_IDS = {"qk_video": 0, "qk_article": 1, "qb_video": 2, "qb_article": 3}
"""Logs take their own ids from separate ranges of this many times `ID_RANGE`."""
ID_RANGE = 100_000_000


@dataclass(frozen=True)
class Ids:
    """Raw ids of a twin's users or items: the first `shared` of them are QK-video's, the rest its own."""

    shared: int
    first_shared: int
    own: int

    def of(self, number_N: Int) -> Int:
        """Raw ids of numbers counted from 0."""
        return np.where(number_N < self.shared, self.first_shared + number_N, self.own + number_N)


def user_ids(scenario: str, users: int) -> Ids:
    """Users' raw ids: each log shares another stretch of QK-video's users, as many as published, scaled."""
    published = PUBLISHED[scenario]
    scale = users / published.users
    before = {"qk_article": 0, "qb_video": 269_207, "qb_article": 269_207 + 3_261}.get(scenario, 0)
    return Ids(round(published.shared_users * scale), 1 + round(before * scale), 1 + OWN_IDS[scenario] * ID_RANGE)


def item_ids(scenario: str, items: int) -> Ids:
    """Items' raw ids, likewise."""
    published = PUBLISHED[scenario]
    return Ids(round(published.shared_items * items / published.items), 1, 1 + OWN_IDS[scenario] * ID_RANGE)
