"""Options of `python -m retrieval`, checked once at the start."""

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
"""More threads only wait for each other, and FAISS dies of thousands."""
MASKS = ("auto", True, False)
BASELINES = ("popularity", "category_popularity", "last_item", "markov", "sequential_rules", "item_knn", "v_sknn")
MOST_GAPS = 20
SOURCES = (
    "model",
    "sequential_rules",
    "markov",
    "item_knn",
    "v_sknn",
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
    index: str = option("auto", ", ".join(INDEXES))
    fidelity: float = option(0.99, "recall@20 of the exact neighbours, and share of HR@20, that an index must keep")
    index_file: str | None = option(None, "where the index is kept; RUN/indexes where none is named")
    memory_gib: float = option(4.0, "memory that an index chosen by auto may take")
    mask_seen: Any = option(
        "auto", "seen items are no candidates: true, false, or auto (true if targets do not repeat)"
    )
    candidates: str = option("clicked", "clicked (items with a kept click) or all")
    cutoffs: list[int] = option([5, 10, 20], "cutoffs of the ranking metrics")
    baselines: list[str] = option(list(BASELINES), f"beside the model: {', '.join(BASELINES)}; the first always")
    blend: Any = option("auto", f"sources joined into one ranking: auto, none, or a list of {', '.join(SOURCES)}")
    neighbours: int = option(100, "sessions that v_sknn, and items that item_knn goes by")
    rules_per_item: int = option(100, "successors that markov and sequential_rules keep of an item")
    rules_gaps: int = option(10, "clicks that a successor of sequential_rules may come later")
    baseline_queries: int = option(50_000, "queries of a split that baselines but popularity are measured on, at most")
    part_queries: int = option(10_000, "queries up to which small files are ranked together, as one part")
    threads: int = option(0, "threads of the search; 0 = one for each core")
    overwrite: bool = option(False, "replace an existing result once the new one is whole")

    @property
    def deepest(self) -> int:
        """The largest cutoff."""
        return max(self.cutoffs)


def load(options: Sequence[str]) -> RetrievalConfig:
    """The checked configuration of a command line.

    Raises:
        InputError: an option is unknown, missing, ill-typed or out of its range.
    """
    config = read_options(RetrievalConfig, "retrieval.conf", options)
    choices: tuple[tuple[str, tuple[Any, ...]], ...] = (("index", INDEXES), ("candidates", CANDIDATES))
    for name, allowed in (*choices, ("mask_seen", MASKS)):
        if getattr(config, name) not in allowed:
            names = [str(value).lower() for value in allowed]
            raise InputError(f"{name} one of {', '.join(names)}", getattr(config, name), f"choose {name}={names[0]}")
    if config.mask_seen != "auto":
        config.mask_seen = bool(config.mask_seen)  # 1 and 0 are true and false
    _check_numbers(config)
    config.blend = checked_blend(config.blend)
    unknown = [name for name in config.baselines if name not in BASELINES]
    if unknown:
        raise InputError(f"baselines of {', '.join(BASELINES)}", unknown[0], "write baselines=[popularity,markov]")
    return config


def checked_blend(blend: Any) -> Any:
    """`auto`, `none` or a list of sources.

    Raises:
        InputError: an unknown source, none or one twice.
    """
    if blend is None or blend is False:
        return "none"  # as which YAML takes the word
    if blend in ("auto", "none"):
        return blend
    named = [blend] if isinstance(blend, str) else list(blend) if isinstance(blend, list) else []
    wrong = [str(name) for name in named if name not in SOURCES]
    if wrong or not named or len(set(named)) != len(named):
        got = wrong[0] if wrong else blend
        raise InputError(f"blend auto, none or a list of {', '.join(SOURCES)}", got, "write blend=[model,v_sknn]")
    return named


def _check_numbers(config: RetrievalConfig) -> None:
    """Raise `InputError` where a number is out of its range."""
    if not 0 < config.fidelity <= 1:
        raise InputError("fidelity in (0, 1]", config.fidelity, "0.99 keeps 99 % of the exact neighbours")
    if not config.cutoffs or min(config.cutoffs) < 1 or sorted(set(config.cutoffs)) != config.cutoffs:
        raise InputError("rising positive cutoffs", config.cutoffs, "write cutoffs=[5,10,20]")
    if config.rules_gaps > MOST_GAPS:
        raise InputError(f"rules_gaps up to {MOST_GAPS}", config.rules_gaps, "a weight of 1/gap is small there")
    for name in ("neighbours", "rules_per_item", "rules_gaps", "baseline_queries", "part_queries"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} of at least 1", getattr(config, name), "give a larger number")
    if not config.memory_gib > 0:
        raise InputError("memory_gib above 0", config.memory_gib, "4 holds millions of vectors")
    most = THREADS_PER_CORE * (os.cpu_count() or 1)
    if not 0 <= config.threads <= most:
        raise InputError(f"threads from 0 to {most}", config.threads, "0 uses every core")
