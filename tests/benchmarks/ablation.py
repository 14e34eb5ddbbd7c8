"""What item features, past actions and counted transitions add to a session model, on logs of different kinds.

Sequence files are named in `NEXTCLICK_SEQUENCES`, logs in the `qb_video` format in `NEXTCLICK_LOGS`, `:` between. Every
figure is of a model trained without the last two clicks.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.benchmarks.models import Run, cell, execute, movielens, program, twin, work
from tests.benchmarks.sequences import PROTOCOL, sessions

FEATURES, ACTIONS = "network.item_features=[category]", "network.past_actions=true"
TRANSITIONS = "network.transitions=true"
PLAIN: dict[str, tuple[str, ...]] = {"plain": (), "transitions": (TRANSITIONS,)}
RICH = PLAIN | {
    "item features": (FEATURES,),
    "past actions": (ACTIONS,),
    "all three": (FEATURES, ACTIONS, TRANSITIONS),
}
CATEGORIES = PLAIN | {"item features": (FEATURES,), "item features and transitions": (FEATURES, TRANSITIONS)}
METRICS = ("hr@10", "ndcg@10")


def log_sessions(path: Path) -> Path:
    """The dataset of a log by the protocol of published sequences."""
    folder = work() / path.name.split(".")[0]
    if not (folder / "data" / "manifest.json").exists():
        folder.mkdir(exist_ok=True)
        options = (f"input={path}", f"output={folder / 'data'}", "scenario=qb_video", "overwrite=true", *PROTOCOL)
        program("etl", *options)
    return folder / "data"


def cases() -> dict[str, tuple[Path, dict[str, tuple[str, ...]]]]:
    """Datasets and the variants that their columns allow."""
    actual: dict[str, tuple[Path, dict[str, tuple[str, ...]]]] = {"MovieLens-100K": (movielens(), RICH)}
    for path in map(Path, filter(None, os.environ.get("NEXTCLICK_SEQUENCES", "").split(":"))):
        actual[path.stem] = (sessions(path), PLAIN)
    for path in map(Path, filter(None, os.environ.get("NEXTCLICK_LOGS", "").split(":"))):
        data = log_sessions(path)
        actual[data.parent.name] = (data, CATEGORIES if "tmall" in data.parent.name else PLAIN)
    return actual | {f"QB twin, smoothness {s}": (twin(0.5, smoothness=s), RICH) for s in (0.7, 0.0)}


def ablation() -> None:
    """One line a dataset and variant of `gru4rec`: valid and test, mean ± standard deviation over seeds."""
    seeds = tuple(range(int(os.environ.get("NEXTCLICK_SEEDS", "1"))))
    print(f"| data | gru4rec | {' | '.join(f'{s} {m}' for s in ('valid', 'test') for m in METRICS)} | events/s |")
    print("|---" * (3 + 2 * len(METRICS)) + "|")
    for title, (data, variants) in cases().items():
        runs = [
            Run(
                f"ablation-{name.replace(' ', '-')}",
                data,
                ("recipe=small", "model=gru4rec", "train.early_stopping_patience=2", *options),
                seed,
                ("blend=none", "baselines=[markov]"),
            )
            for seed in seeds
            for name, options in variants.items()
        ]
        actual = execute(runs)
        for name in variants:
            results = [actual[f"ablation-{name.replace(' ', '-')}", seed] for seed in seeds]
            cells = [cell([r[s][m] for r in results], None) for s in ("valid", "test") for m in METRICS]
            rate = sum(r["examples_per_second"] for r in results) / len(results)
            print(f"| {title} | {name} | {' | '.join(cells)} | {rate:,.0f} |", flush=True)
