"""`python -m tests.benchmarks [NAME …]` (`make bench`): run benchmarks and print their tables."""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version

from tests.benchmarks import (
    ablation,
    curve,
    gpu,
    large_blend,
    losses,
    models,
    multitask,
    official,
    peers,
    quality,
    rates,
    reading,
    recipes,
    relatedness,
    retrieval,
    sensitivity,
    sequences,
    smoothness,
    sources,
)

BENCHMARKS = {
    "train": rates.training,
    "search": rates.search,
    "sources": sources.sources,
    "etl": peers.sessionizing,
    "movielens": quality.movielens,
}
LONG = {
    "gpu": gpu.gpu,
    "models": models.models,
    "relatedness": relatedness.relatedness,
    "multitask": multitask.multitask,
    "ladder": models.ladder,
    "curve": curve.curve,
    "smoothness": smoothness.smoothness,
    "ablation": ablation.ablation,
    "sensitivity": sensitivity.sensitivity,
    "reading": reading.reading,
    "recipes": recipes.recipes,
    "losses": losses.losses,
    "sequences": sequences.sequences,
    "large_blend": large_blend.large_blend,
    "retrieval": retrieval.large,
    "workers": rates.workers,
    "official": official.official,
}
"""Run by name only: an hour of training or more each, except `reading` (minutes) and `gpu` (ten minutes on a GPU)."""


def main(names: list[str]) -> int:
    known = BENCHMARKS | LONG
    unknown = set(names) - known.keys()
    if unknown:
        print(f"error: expected benchmarks of {', '.join(known)}, got {unknown.pop()} (name one)", file=sys.stderr)
        return 2
    packages = ("torch", "faiss-cpu", "pyspark", "pyarrow", "polars", "numpy", "ray")
    print(datetime.now(UTC).date(), platform.processor() or platform.machine(), f"Python {platform.python_version()}")
    print("  ".join(f"{name} {version(name)}" for name in packages))
    for name in names or BENCHMARKS:
        print(f"\n## {name}", flush=True)
        known[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
