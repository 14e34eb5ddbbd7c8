"""The learning curve: what more users of the same catalogue give, by `recipe=small` as it stands.

Each size is a twin of its own users over one catalogue, so a figure is compared with the best possible for just
these users, compared with two baselines that need no training: counts of items and of pairs.
"""

from __future__ import annotations

from tests.benchmarks.models import QB_USERS, TASKS, Run, best_possible, cell, execute, twin

SIZES = {"a tenth": QB_USERS // 10, "a third": QB_USERS // 3, "all": QB_USERS, "three times": 3 * QB_USERS}
MODELS = ("gru4rec", "hybrid")
BASELINES = ("popularity", "markov")
STOP = ("train.early_stopping_patience=2",)
LAST = {"three times": ("train.epochs=3",)}
"""Instead of the recipe's patience of four and its twenty epochs: they end training earlier and change nothing of the
epochs before, for learning rates are constant."""


def curve() -> None:
    """One line a size and model: test metrics, in brackets the share of the best possible."""
    columns = ["hr@20", "ndcg@20", *(f"auc/{task}" for task in TASKS)]
    print("QB-video twin, test; in brackets the share of the best possible")
    print("| users | model | " + " | ".join(columns) + " | best epoch |\n" + "|---" * (len(columns) + 3) + "|")
    for title, users in SIZES.items():
        data = twin(0.5, users)
        stop = (*STOP, *LAST.get(title, ()))
        evaluation = (f"baselines=[{','.join(BASELINES)}]",)
        runs = [Run(f"curve-{m}", data, ("recipe=small", f"model={m}", *stop), evaluation=evaluation) for m in MODELS]
        actual = execute(runs)
        truth = best_possible(data)
        rows = {name: (result["test"], str(result["best_epoch"])) for (name, _), result in actual.items()}
        baselines = actual["curve-gru4rec", 0]["baselines"]
        rows |= {name: (baselines[name]["test"], "") for name in BASELINES}
        for name, (values, epoch) in rows.items():
            cells = [cell([values.get(column)], truth.get(column)) for column in columns]
            print(f"| {title}: {users:,} | {name.removeprefix('curve-')} | {' | '.join(cells)} | {epoch} |", flush=True)
