"""The published sizes of the four logs."""

from __future__ import annotations

from dataclasses import dataclass


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
