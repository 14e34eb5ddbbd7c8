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
from etl.runtime.hashing import multiplicative_hash

FOLDS = 3
FILE = "blend.json"


def fold_of(user_Q: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The fold of each user, 0..FOLDS - 1, a function of the user id."""
    return multiplicative_hash(user_Q, 31) % FOLDS


@dataclass(frozen=True)
class Weights:
    """Weights of a sum, and optionally a re-ranker of its top candidates.

    Attributes:
        weights: weight of each source.
        reranker: LightGBM model text; None = no re-ranker.
        temperature: softmax temperature of the model's scores; None = that of all users, as in earlier versions.
    """

    weights: dict[str, float]
    reranker: str | None = field(default=None, repr=False)
    temperature: float | None = None


@dataclass(frozen=True)
class FittedBlend:
    """A blend fitted on valid queries.

    Attributes:
        names: source names.
        temperature: softmax temperature of the model's scores, for all users.
        kind: `sum` or `reranker`, whichever is better on valid, cross-fitted.
        all_users: fitted on all users; used for test and next.
        folds: fitted without the users of each fold; used for their valid queries.
        selection: details of the selection: NDCG of both kinds and of each single source, queries, hits, trees.
    """

    names: list[str]
    temperature: float
    kind: str
    all_users: Weights
    folds: list[Weights]
    selection: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write the file, atomically."""
        record = asdict(self)
        record["everyone"] = record.pop("all_users")
        with atomic_file(folder / FILE) as file:
            file.write_text(json.dumps(record | {"fingerprint": fingerprint_of(record)}))

    @classmethod
    def read(cls, folder: Path) -> FittedBlend | None:
        """Read the blend; None if there is none.

        Raises:
            InputError: the file was changed.
        """
        try:
            record = json.loads((folder / FILE).read_text())
            if record.pop("fingerprint") != fingerprint_of(record):
                raise ValueError("other content")
            all_users, folds = Weights(**record.pop("everyone")), [Weights(**fold) for fold in record.pop("folds")]
            return cls(**record, all_users=all_users, folds=folds)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError("the blend that was learned", f"{folder / FILE} ({error})", "delete it") from None
