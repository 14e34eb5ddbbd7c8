"""Sensitivity on MovieLens-100K: session length, embedding size, regularisation, neighbours.

One option at a time is changed around `recipe=small`. Epochs are selected on valid as always; the test figures are
only reported and select nothing.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.benchmarks.models import Run, cell, execute, movielens, program, task_weights

MODELS = ("gru4rec", "hybrid")
COLUMNS = ("hr@20", "ndcg@20", "auc/like", "auc/share")
CHANGES: dict[str, tuple[str, ...]] = {
    "recipe=small": (),
    **{
        f"embedding size {size}": (f"network.embedding_dim={size}", f"network.hidden_size={size}")
        for size in (32, 64, 256)
    },
    **{f"item dropout {rate}": (f"network.embedding_dropout={rate}",) for rate in (0.0, 0.5)},
    **{f"state dropout {rate}": (f"network.state_dropout={rate}",) for rate in (0.0, 0.5)},
    **{f"score regulariser {weight}": (f"train.bpr_max_regularisation={weight}",) for weight in (0.0, 3.0)},
    **{f"weight decay {decay}": (f"train.weight_decay={decay}",) for decay in (1e-3,)},
}
WEIGHTS = {f"task weights {weight}": (task_weights(weight),) for weight in (0.1, 0.3, 1.0)}
"""Weights of the hybrid's feedback tasks."""
LENGTHS = (10, 30, 100)
"""Retained clicks of a session. The target is the user's last click at every length, so the queries are the same."""
NEIGHBOURS = (10, 30, 100, 300, 900)


def sensitivity(seeds: tuple[int, ...] = (0, 1)) -> None:
    """Three tables: options of the models, retained clicks of a session, neighbours of the two neighbour baselines."""
    for model in MODELS:
        changes = CHANGES | (WEIGHTS if model == "hybrid" else {})
        runs = [
            Run(name_of(model, change), movielens(), ("recipe=small", f"model={model}", *options), seed)
            for change, options in changes.items()
            for seed in seeds
        ]
        actual = execute(runs)
        table(f"{model}, MovieLens-100K", {c: [actual[name_of(model, c), seed] for seed in seeds] for c in changes})
    for model in MODELS:
        results = {}
        for length in LENGTHS:
            arguments = (name_of(model, "recipe=small"), movielens(length), ("recipe=small", f"model={model}"))
            runs = [Run(*arguments, seed) for seed in seeds]
            results[f"last {length} clicks"] = list(execute(runs).values())
        table(f"{model}, MovieLens-100K by retained clicks", results)
    neighbours(Run(name_of("gru4rec", "recipe=small"), movielens(), (), seeds[0]))


def name_of(model: str, change: str) -> str:
    return f"sensitivity-{model}-{change.replace(' ', '-').replace('=', '-')}"


def table(title: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """One line per setting: valid NDCG@20, test metrics over seeds, best epochs, training seconds."""
    print(f"\n{title}: mean ± standard deviation over seeds")
    heads = ("setting", "valid ndcg@20", *COLUMNS, "best epochs", "seconds")
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for setting, actual in results.items():
        cells = [cell([result["valid"]["ndcg@20"] for result in actual], None)]
        cells += [cell([result["test"].get(column) for result in actual], None) for column in COLUMNS]
        epochs = ", ".join(str(result["best_epoch"]) for result in actual)
        seconds = np.mean([result["seconds"] for result in actual])
        print(f"| {setting} | {' | '.join(cells)} | {epochs} | {seconds:.0f} |", flush=True)


def neighbours(run: Run) -> None:
    """V-SkNN by its number of neighbour sessions and ItemKNN by its number of neighbour items."""
    print("\nMovieLens-100K, test HR@20 / NDCG@20 by neighbours\n| neighbours | v_sknn | item_knn |\n|---|---|---|")
    for count in NEIGHBOURS:
        result = run.folder / f"result-neighbours-{count}"
        if not (result / "metrics.json").exists():
            options = (f"bundle={run.folder / 'bundle'}", f"data={run.data}", f"output={result}", "overwrite=true")
            program("retrieval", *options, f"neighbours={count}", "baselines=[item_knn,v_sknn]", "threads=1")
        actual = json.loads((result / "metrics.json").read_text())["baselines"]
        cells = (
            f"{actual[n]['test']['hr@20']:.4f} / {actual[n]['test']['ndcg@20']:.4f}" for n in ("v_sknn", "item_knn")
        )
        print(f"| {count} | {' | '.join(cells)} |", flush=True)
