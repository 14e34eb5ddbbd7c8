"""Published statistics of the four real logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LogTotals:
    """Totals of a log in the Tenrec paper (Yuan et al. 2022), None if it has no such column."""

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

    def total(self, action: str) -> int:
        """Number of rows with an action; 0 if the log has no such column."""
        totals = {
            "like": self.likes,
            "share": self.shares,
            "follow": self.follows,
            "read": self.reads,
            "favorite": self.favorites,
        }
        return totals[action] or 0


PUBLISHED = {
    "qk_video": LogTotals(5_022_750, 3_753_436, 493_458_970, 142_321_193, 10_141_195, 1_128_312, 857_678),
    "qb_video": LogTotals(
        34_240, 130_637, 2_442_299, 1_701_171, 20_687, 2_541, 2_487, shared_users=3_261, shared_items=78_482
    ),
    "qk_article": LogTotals(
        1_325_838,
        220_122,
        46_111_728,
        46_111_728,
        821_888,
        591_834,
        62_239,
        44_228_593,
        316_627,
        shared_users=269_207,
    ),
    "qb_article": LogTotals(24_516, 7_355, 348_736, 348_736, None, None, None, shared_users=58),
}
"""Totals of the logs; article logs have only clicked rows. `shared_users` and `shared_items` are those in common with
QK-video."""


@dataclass(frozen=True)
class Scanned:
    """Statistics from public scans of a real log's rows, in addition to its totals.

    Attributes:
        resumed_blocks: number of times that a user's rows continue after rows of other users.
        unclicked: share of an action's rows that were not clicked, by action. For QK-video's likes it is between 37
            and 57 %, and 5.77 M of its rows have an action without a click; QB-video's shares are from its first
            500,000 rows.
        changing_gender: share of users with more than one gender.
    """

    resumed_blocks: int = 0
    unclicked: Mapping[str, float] = field(default_factory=dict)
    changing_gender: float = 0.0

    def blocks(self, published: LogTotals) -> float:
        """Mean number of contiguous blocks per user."""
        return 1.0 + self.resumed_blocks / published.users


SCANNED = {
    "qk_video": Scanned(87_430_415, {"like": 0.5, "share": 0.35, "follow": 0.35}),
    "qb_video": Scanned(16_706, {"like": 0.296, "share": 0.17, "follow": 0.43}),
    "qk_article": Scanned(changing_gender=0.02),
    "qb_article": Scanned(changing_gender=0.02),
}

GENDERS = (0.19, 0.58, 0.23)
"""Shares of gender 0 (unknown), 1, 2."""
AGES = (0.186, 0.020, 0.491, 0.212, 0.066, 0.018, 0.005, 0.002)
"""Shares of age 0 (unknown) to 7."""
VIDEO_CATEGORIES = (0.547, 0.453)
"""Shares of category 0 and 1 among rows with a category."""
NULL_CATEGORIES = 0.013
"""Share of rows without a category."""
ENTERED = 0.57
"""Share of unclicked rows that were entered (`watching_times` of at least 1)."""
CONFLICTS = 0.0047
"""Share of rows that show an item to a user again, clicked once and unclicked once."""
FEWEST_ITEMS = 1_000
"""Smallest catalogue of a twin: 25 items for each of its 40 topics."""

_PROFILES = {
    **{f"gender {value}": share for value, share in enumerate(GENDERS)},
    **{f"age {value}": share for value, share in enumerate(AGES)},
}
_VIDEO = {
    **_PROFILES,
    "category 0": 0.54,
    "category 1": 0.45,
    "category null": 0.013,
    "entered share of unclicked rows": 0.57,
    "exact duplicates": 0.0073,
    "repeated pairs of user and item": 0.0150,
    "pairs with conflicting clicks, per row": 0.0047,
}
_ARTICLE = {"click rate": 1.0, "rows with an action and no click": 0.0}
FIRST_USERS = "users in the first 100,000 rows"
NUMBERS = (
    *("rows", "clicks", "likes", "shares", "follows", FIRST_USERS),
    *("mean run of a user's rows", "blocks of a user", "fewest clicks of a user"),
)
"""Statistics that are counts or means; the others are shares."""
SCAN_STATISTICS: dict[str, dict[str, float | tuple[float, float]]] = {
    "qk_video": {
        **_VIDEO,
        "click rate": 0.2884,
        "rows with an action and no click": 0.0117,
        "likes on unclicked rows": (0.37, 0.57),
        "mean run of a user's rows": 5.3,
        "blocks of a user": 18.4,
        FIRST_USERS: 8_012,
    },
    "qb_video": {
        **_VIDEO,
        "click rate": 0.6965,
        "likes on unclicked rows": 0.296,
        "shares on unclicked rows": 0.173,
        "follows on unclicked rows": 0.430,
        "blocks of a user": 1.49,
    },
    "qk_article": {**_ARTICLE, "blocks of a user": 1.0},
    "qb_article": {**_ARTICLE, "blocks of a user": 1.0},
}
"""Statistics from public scans of the real logs by scenario: a value, or its bounds.

Profiles, categories, entered rows and repeats of the video logs were counted in the CTR file of QK-video
(120,342,306 rows); the others in the logs themselves.
"""
