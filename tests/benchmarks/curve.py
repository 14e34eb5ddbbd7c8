"""The learning curve: quality with more users of the same catalogue, by `recipe=small`.

Each size is a twin with its own users over one catalogue, so a figure is compared with the best possible for
these users, and with two baselines that need no training: counts of items and of pairs.
"""

from __future__ import annotations

import os

from retrieval.rankers.registry import MODEL
from tests.benchmarks.ablation import found
from tests.benchmarks.models import QB_USERS, TASKS, Run, best_possible, cell, execute, twin

SIZES = {"a tenth": QB_USERS // 10, "a third": QB_USERS // 3, "all": QB_USERS, "three times": 3 * QB_USERS}
TRANSITIONS = "network.transitions=true"
MODELS = {
    "gru4rec": ("model=gru4rec",),
    "hybrid": ("model=hybrid",),
    **{
        f"{model}-transitions": (f"model={model}", TRANSITIONS) for model in ("gru4rec", "sasrec", "srgnn", "nextitnet")
    },
    "hybrid-transitions": ("model=hybrid", TRANSITIONS),
}
"""All models, or those in `NEXTCLICK_MODELS`, separated by `:`."""
BASELINES = ("popularity", "markov")
STOP = ("train.early_stopping_patience=2",)
LAST = {"three times": ("train.epochs=3",)}
"""Instead of the recipe's patience of four and its twenty epochs: training ends earlier and is the same in the
epochs before, since learning rates are constant."""


def curve() -> None:
    """One line per size and model: test metrics (in brackets: share of the best possible); "found" as in `ablation`."""
    chosen = os.environ.get("NEXTCLICK_MODELS", ":".join(MODELS)).split(":")
    columns = ["hr@20", "ndcg@20", *(f"auc/{task}" for task in TASKS)]
    print("QB-video twin, test; in brackets the share of the best possible")
    print("| users | model | " + " | ".join(columns) + " | found | best epoch |\n" + "|---" * (len(columns) + 4) + "|")
    for title, users in SIZES.items():
        data = twin(0.5, users)
        stop = (*STOP, *LAST.get(title, ()))
        evaluation = (f"baselines=[{','.join(BASELINES)}]", "blend=none")
        runs = [
            Run(f"curve-{name}", data, ("recipe=small", *MODELS[name], *stop), evaluation=evaluation) for name in chosen
        ]
        actual, truth = execute(runs), best_possible(data)
        rows = {
            run.name: (actual[run.name, 0]["test"], found(run, MODEL), str(actual[run.name, 0]["best_epoch"]))
            for run in runs
        }
        baselines = actual[runs[0].name, 0]["baselines"]
        rows |= {name: (baselines[name]["test"], found(runs[0], name), "") for name in BASELINES}
        for name, (values, share, epoch) in rows.items():
            cells = [cell([values.get(column)], truth.get(column)) for column in columns]
            row = (
                f"| {title}: {users:,} | {name.removeprefix('curve-')} | {' | '.join(cells)} | {share:.4f} | {epoch} |"
            )
            print(row, flush=True)
