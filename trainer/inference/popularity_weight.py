"""Weight of item popularity in a trained model's scores, fitted on validation sessions.

Losses that compare an item with sampled ones, as BPR-max, leave popularity to be learned click by click. Where most
items have few clicks, the biases are too small after the best epoch; the log of the click counts says what they lack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from etl.runtime.arrays import IntArray
from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from retrieval.metrics.significance import gains

POPULARITY = "popularity_weight.json"
"""File of the fitted weight in a run folder."""
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Weights to try, ascending, as multiples of the scores' standard deviation."""
PATIENCE = 2
"""Number of weights in a row that do not raise NDCG before the search ends."""
METRIC = "ndcg@20"
ERRORS = 2.0
"""Standard errors that a gain must exceed: several weights are tried, and items without clicks lose by all of them."""


def find_weight(ranks_with: Callable[[float], IntArray], score_deviation: float) -> float:
    """The weight with the highest NDCG@20, or 0 if no gain is above two standard errors.

    Args:
        ranks_with: returns the targets' ranks `[Q]` with a weight, always of the same queries.
        score_deviation: standard deviation of a query's scores over the candidates, the scale of the search. It is
            rounded to a power of 2, so that rounding errors do not change the weight.
    """
    without = gains(ranks_with(0.0), METRIC)
    best, best_gain, worse = 0.0, 0.0, 0
    if not len(without) or not 0 < score_deviation < math.inf:
        return best
    unit = 2.0 ** round(math.log2(score_deviation))
    for weight in (unit * factor for factor in FACTORS):
        difference = gains(ranks_with(weight), METRIC) - without
        if difference.mean() > max(best_gain, ERRORS * standard_error(difference)):
            best, best_gain, worse = weight, float(difference.mean()), 0
        else:
            worse += 1
        if worse == PATIENCE and best:
            break
    return best


def standard_error(difference_Q: npt.NDArray[np.float64]) -> float:
    """Standard error of a mean."""
    return float(difference_Q.std() / math.sqrt(len(difference_Q)))


def write_weight(run: Path, weight: float) -> None:
    """Save the weight in the run."""
    write_json(run / POPULARITY, {"weight": weight})


def read_weight(run: Path) -> float | None:
    """The weight saved by `write_weight`; None for runs that fitted none.

    Raises:
        InputError: the file is damaged.
    """
    if not (run / POPULARITY).is_file():
        return None
    try:
        weight = float(json.loads((run / POPULARITY).read_text())["weight"])
        if 0 <= weight < math.inf:
            return weight
    except (TypeError, ValueError, KeyError):
        pass
    raise InputError("a weight of at least 0", run / POPULARITY, "train the run again")
