"""Ablation of item features, past actions and counted transitions in a session model, on logs of different kinds.

Sequence files are given by `NEXTCLICK_SEQUENCES`, logs in the `qb_video` format by `NEXTCLICK_LOGS`, separated by `:`;
`NEXTCLICK_CASES` selects some of the data (default: all), `NEXTCLICK_SEEDS` the number of seeds. Every figure is
of a model trained without the last two clicks. "Found" is HR@20 of test targets whose step from the last click was
counted in train.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from etl.dataset import open_dataset
from retrieval.ranks_file import read_ranks
from retrieval.sources.sessions import TrainSessions
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
TWIN_USERS, TWIN_ITEMS = 5_000, 19_761
"""More than a tenth of QB-video: a variant takes a minute or two."""


def log_sessions(path: Path, *protocol: str) -> Path:
    """The dataset of a log by the protocol of published sequences, or with further protocol options."""
    folder = work() / "-".join([path.name.split(".")[0], *(option.replace("=", "-") for option in protocol)])
    if not (folder / "data" / "manifest.json").exists():
        folder.mkdir(exist_ok=True)
        options = (f"input={path}", f"output={folder / 'data'}", "scenario=qb_video", "overwrite=true", *PROTOCOL)
        program("etl", *options, *protocol)
    return folder / "data"


def cases() -> dict[str, tuple[Path, dict[str, tuple[str, ...]]]]:
    """Datasets and the variants that their columns allow."""
    actual: dict[str, tuple[Path, dict[str, tuple[str, ...]]]] = {"MovieLens-100K": (movielens(), RICH)}
    for path in map(Path, filter(None, os.environ.get("NEXTCLICK_SEQUENCES", "").split(":"))):
        actual[path.stem] = (sessions(path), PLAIN)
    for path in map(Path, filter(None, os.environ.get("NEXTCLICK_LOGS", "").split(":"))):
        data = log_sessions(path)
        actual[data.parent.name] = (data, CATEGORIES if "tmall" in data.parent.name else PLAIN)
    for value in (0.7, 0.0):
        actual[f"QB twin, smoothness {value}"] = (twin(0.5, TWIN_USERS, smoothness=value, items=TWIN_ITEMS), RICH)
    return actual


def ablation() -> None:
    """One line per dataset and variant of `gru4rec`: valid and test, mean ± standard deviation over seeds."""
    seeds = tuple(range(int(os.environ.get("NEXTCLICK_SEEDS", "1"))))
    chosen = os.environ.get("NEXTCLICK_CASES", "")
    columns = [*(f"{s} {m}" for s in ("valid", "test") for m in METRICS), "found", "events/s"]
    print(f"| data | gru4rec | {' | '.join(columns)} |\n" + "|---" * (2 + len(columns)) + "|")
    for title, (data, variants) in cases().items():
        if chosen and title not in chosen.split(":"):
            continue
        runs = [
            Run(
                variant_name(name),
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
            results = [actual[variant_name(name), seed] for seed in seeds]
            cells = [cell([r[s][m] for r in results], None) for s in ("valid", "test") for m in METRICS]
            cells.append(cell([found(run, "model") for run in runs if run.name == variant_name(name)], None))
            rate = sum(r["examples_per_second"] for r in results) / len(results)
            print(f"| {title} | {name} | {' | '.join(cells)} | {rate:,.0f} |", flush=True)
        markov = actual[variant_name("plain"), 0]
        cells = [cell([markov["baselines"]["markov"][s][m]], None) for s in ("valid", "test") for m in METRICS]
        cells.append(cell([found(runs[0], "markov")], None))
        print(f"| {title} | Markov | {' | '.join(cells)} | |", flush=True)


def variant_name(variant: str) -> str:
    return f"ablation-{variant.replace(' ', '-')}"


def found(run: Run, ranker: str) -> float:
    """HR@20 over the test targets whose step from the last click was counted in train."""
    dataset = open_dataset(run.data)
    train, complete = TrainSessions.of(dataset), TrainSessions.of(dataset, 0)
    item, size, end = train.items.astype(np.int64), dataset.manifest.n_items + 1, complete.offset[1:]
    steps = (item[:-1] * size + item[1:])[train.session[:-1] == train.session[1:]]
    last, target = complete.items[end - 2].astype(np.int64), complete.items[end - 1]
    rank = read_ranks(run.folder / "result" / "ranks.parquet", rankers=[ranker])[ranker]["rank"].to_numpy()
    return float((rank[np.isin(last * size + target, steps)] <= 20).mean())
