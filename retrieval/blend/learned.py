"""A fitted blend on disk: weights and re-rankers, for all users and for each cross-fitting fold."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.runtime.errors import InputError
from etl.runtime.files import atomic_file, fingerprint_of

FOLDS = 3
FILE = "blend.json"


def fold_of(user_Q: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The fold of each user, 0..FOLDS - 1, by the user id alone."""
    mixed = user_Q.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(33)) % np.uint64(FOLDS)).astype(np.int64)


@dataclass(frozen=True)
class Weights:
    """A weighted sum and perhaps a re-ranker of its best (LightGBM's text)."""

    weights: dict[str, float]
    reranker: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Learned:
    """What was learned on valid queries.

    Attributes:
        names: of the sources.
        temperature: of the model's scores.
        kind: `sum` or `reranker`, whichever ranks better on valid, cross-fitted.
        everyone: learned on all users: for test and next.
        folds: learned without the users of each fold: for their valid queries.
        selection: what it was chosen by: NDCG of both kinds and of each source alone, queries, hits, trees.
    """

    names: list[str]
    temperature: float
    kind: str
    everyone: Weights
    folds: list[Weights]
    selection: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write the file, atomically."""
        record = asdict(self)
        with atomic_file(folder / FILE) as file:
            file.write_text(json.dumps(record | {"fingerprint": fingerprint_of(record)}))

    @classmethod
    def read(cls, folder: Path) -> Learned | None:
        """What `write` wrote; None where nothing was.

        Raises:
            InputError: the file is not the one that was written.
        """
        try:
            record = json.loads((folder / FILE).read_text())
            if record.pop("fingerprint") != fingerprint_of(record):
                raise ValueError("other content")
            everyone, folds = Weights(**record.pop("everyone")), [Weights(**fold) for fold in record.pop("folds")]
            return cls(**record, everyone=everyone, folds=folds)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError("the blend that was learned", f"{folder / FILE} ({error})", "delete it") from None
