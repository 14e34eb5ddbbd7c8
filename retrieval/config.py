"""Options of `python -m retrieval` and their validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.options import option, read_options

INDEXES = ("auto", "flat", "ivf_flat", "ivf_sq8", "ivf_pq_refine", "hnsw")
CANDIDATES = ("clicked", "all")
THREADS_PER_CORE = 4
"""Upper limit: more threads do not help, and FAISS crashes with thousands."""
MASKS = ("auto", True, False)
BASELINES = (
    "popularity",
    "category_popularity",
    "last_item",
    "markov",
    "sequential_rules",
    "item_knn",
    "v_sknn",
    "stan",
)
MAX_GAPS = 20
SOURCES = (
    "model",
    "sequential_rules",
    "markov",
    "item_knn",
    "v_sknn",
    "stan",
    "popularity",
    "category_popularity",
    "repeats",
)


@dataclass
class RetrievalConfig:
    """Options of `python -m retrieval`."""

    bundle: str = option(MISSING, "bundle of a training run")
    data: str = option(MISSING, "the dataset it was trained on")
    output: str = option(MISSING, "result folder to make")
    index: str = option("auto", "kind of nearest-neighbour index", choices=INDEXES)
    fidelity: float = option(
        0.99, "recall@20 of the exact neighbours and ratio of HR@20 that an index must reach", above=0, at_most=1
    )
    index_file: str | None = option(None, "file of the index; default: in RUN/indexes")
    memory_gib: float = option(4.0, "memory that an index chosen by auto may take, in GiB", above=0)
    mask_seen: Any = option(
        "auto", "exclude seen items from the candidates; auto = true if targets do not repeat", choices=MASKS
    )
    candidates: str = option("clicked", "candidate items; clicked = items with a retained click", choices=CANDIDATES)
    cutoffs: list[int] = option([5, 10, 20], "cutoffs of the ranking metrics")
    baselines: list[str] = option(
        list(BASELINES), f"in addition to the model: {', '.join(BASELINES)}; the first always"
    )
    blend: Any = option("auto", f"sources joined into one ranking: auto, none, or a list of {', '.join(SOURCES)}")
    neighbours: int = option(100, "nearest sessions of v_sknn and stan, and nearest items of item_knn", at_least=1)
    rules_per_item: int = option(100, "successors of an item that markov and sequential_rules retain", at_least=1)
    rules_gaps: int = option(
        10, "largest distance in clicks of a successor in sequential_rules", at_least=1, at_most=MAX_GAPS
    )
    max_queries: int | None = option(
        None,
        "maximum number of queries of valid, and of test, that are ranked, evenly spaced; null = all. Recommendations "
        "are for all queries",
        at_least=1,
    )
    baseline_queries: int = option(
        50_000, "maximum number of queries of a split that baselines other than popularity are measured on", at_least=1
    )
    part_queries: int = option(10_000, "queries up to which small files are ranked together as one part", at_least=1)
    threads: int = option(0, "threads of the search; 0 = one for each core")
    titles: str | None = option(None, "file with the columns item_id, title and optionally picture, for the report")
    overwrite: bool = option(False, "replace an existing result once the new one is complete")

    @property
    def deepest(self) -> int:
        """The largest cutoff."""
        return max(self.cutoffs)


def load(options: Sequence[str]) -> RetrievalConfig:
    """Parse and validate a command line.

    Raises:
        InputError: an option is unknown, missing, ill-typed or out of its range.
    """
    config = read_options(RetrievalConfig, None, options)
    if config.mask_seen != "auto":
        config.mask_seen = bool(config.mask_seen)  # accept 1 and 0
    _check_numbers(config)
    config.blend = checked_blend(config.blend)
    unknown = [name for name in config.baselines if name not in BASELINES]
    if unknown:
        raise InputError(f"baselines of {', '.join(BASELINES)}", unknown[0], "write baselines=[popularity,markov]")
    return config


def checked_blend(blend: Any) -> Any:
    """Validate `blend`: `auto`, `none` or a list of sources.

    Raises:
        InputError: an unknown or repeated source, or an empty list.
    """
    if blend is None or blend is False:
        return "none"  # YAML parses none as null
    if blend in ("auto", "none"):
        return blend
    named = [blend] if isinstance(blend, str) else list(blend) if isinstance(blend, list) else []
    wrong = [str(name) for name in named if name not in SOURCES]
    if wrong or not named or len(set(named)) != len(named):
        got = wrong[0] if wrong else blend
        raise InputError(f"blend auto, none or a list of {', '.join(SOURCES)}", got, "write blend=[model,v_sknn]")
    return named


def _check_numbers(config: RetrievalConfig) -> None:
    """Raise `InputError` if a number is out of range."""
    if not config.cutoffs or min(config.cutoffs) < 1 or sorted(set(config.cutoffs)) != config.cutoffs:
        raise InputError("rising positive cutoffs", config.cutoffs, "write cutoffs=[5,10,20]")
    maximum = THREADS_PER_CORE * (os.cpu_count() or 1)
    if not 0 <= config.threads <= maximum:
        raise InputError(f"threads from 0 to {maximum}", config.threads, "0 uses every core")
