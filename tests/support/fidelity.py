"""References of exact search over several batches of queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from retrieval.search.tuning import ExactReference


def joined(parts: Sequence[ExactReference]) -> ExactReference:
    """The references of all queries as one."""
    arrays = {
        entry.name: np.concatenate([getattr(part, entry.name) for part in parts])
        for entry in fields(ExactReference)
        if entry.name != "seconds"
    }
    return ExactReference(**arrays, seconds=sum(part.seconds for part in parts))
