"""Published results of others for Tenrec, by other protocols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedTable:
    """Results of others' code and protocol, shown next to a table but not comparable.

    Attributes:
        source: who measured them and how.
        log: scenario of the logs that they are shown for.
        rows: metrics by model.
    """

    source: str
    log: str
    rows: Mapping[str, Mapping[str, float]]


SESSIONS_PUBLISHED = (
    PublishedTable(
        "Tenrec's paper, table 3: QK-video, a million users, its own models and tuning, targets ranked in batches",
        "qk_video",
        {
            "GRU4Rec": {"hr@20": 0.04882, "ndcg@20": 0.0192},
            "NextItNet": {"hr@20": 0.05112, "ndcg@20": 0.0199},
            "SASRec": {"hr@20": 0.05017, "ndcg@20": 0.0194},
            "BERT4Rec": {"hr@20": 0.04902, "ndcg@20": 0.0185},
        },
    ),
)
MERLIN = (
    ("separate networks", 0.7824, 0.9201, 0.8131, 0.8599),
    ("MMoE", 0.7826, 0.9217, 0.8396, 0.8804),
    ("PLE", 0.7820, 0.9218, 0.8411, 0.8795),
)
ROWS_PUBLISHED = (
    PublishedTable(
        "Tenrec's paper, table 4; the gates of its code are never trained",
        "ctr",
        {
            "a network per task": {"auc/click": 0.7957, "auc/like": 0.9160},
            "ESMM": {"auc/click": 0.7940, "auc/like": 0.9110},
            "MMoE": {"auc/click": 0.7900, "auc/like": 0.9020},
            "PLE": {"auc/click": 0.7822, "auc/like": 0.9103},
        },
    ),
)
MERLIN_PUBLISHED = (
    PublishedTable(
        "NVIDIA Merlin's quick start: ten million rows of QK-video, users and items with 30 rows or more, 200 "
        "trials a model",
        "ctr",
        {
            name: dict(zip(("auc/click", "auc/like", "auc/share", "auc/follow"), values, strict=True))
            for name, *values in MERLIN
        },
    ),
)
