"""The cost of several tasks for the next click, and the inputs that predict feedback: states, features, past actions.

Hybrids, with the best epoch of each task, against their encoder (next click) and `rank_mmoe`, which also reads the
categories (feedback), on QB-video twins with the task correlations in `NEXTCLICK_CORRELATIONS`
(default 0:0.5:1) and on MovieLens-100K. AUCs of twins are in expectation over labels (`expected.py`).
`NEXTCLICK_SEEDS` seeds, one by default.
"""

from __future__ import annotations

import json
import math
import os

from etl.dataset import open_dataset
from tests.benchmarks.models import (
    TWIN,
    TWIN_RANK,
    Run,
    best_possible,
    cell,
    execute,
    movielens,
    truth_of,
    twin,
)

FEATURES = ("network.item_features=[category]",)
EPOCH = ("train.best_epoch_by_task=true",)
MODELS: dict[str, tuple[str, ...]] = {
    "gru4rec": ("model=gru4rec",),
    "hybrid, towers of item vectors alone": ("model=hybrid", "network.feedback_feature_dim=0", *EPOCH),
    "hybrid": ("model=hybrid", *EPOCH),
    "hybrid, item features, past actions": ("model=hybrid", *FEATURES, "network.past_actions=true", *EPOCH),
    "rank_mmoe": ("model=rank_mmoe",),
    "rank_mmoe, item features": ("model=rank_mmoe", *FEATURES, *EPOCH),
}
RATES = {"model=rank_mmoe": TWIN_RANK}


def multitask() -> None:
    """One table per log: next click, feedback AUCs, entropy of gates relative to uniform gates, events/s."""
    for correlation in map(float, os.environ.get("NEXTCLICK_CORRELATIONS", "0:0.5:1").split(":")):
        compare(f"QB-video twin, task_correlation={correlation:g}", correlation)
    compare("MovieLens-100K", None)


def compare(title: str, correlation: float | None) -> None:
    """The table of one log: a twin with this correlation, or MovieLens."""
    data, seeds = (
        movielens() if correlation is None else twin(correlation, topics=True),
        range(int(os.environ.get("NEXTCLICK_SEEDS", "1"))),
    )
    runs = [
        Run(
            f"multitask-{name.replace(', ', '-').replace(' ', '-')}",
            data,
            (*options, *((*TWIN, *RATES.get(options[0], ())) if correlation is not None else ())),
            seed,
            ("blend=none",),
        )
        for seed in seeds
        for name, options in MODELS.items()
    ]
    actual, tasks = execute(runs), ("click", "like", "share", "follow")[: 4 if correlation is not None else 3]
    ranking, dataset = ["hr@10", "hr@20", "ndcg@20"], open_dataset(data)
    best = best_possible(data)
    print(f"\n{title}, test over {len(seeds)} seeds; in brackets the share of the best possible")
    print(
        f"| model | {' | '.join((*ranking, *tasks))} | gates' entropy | events/s |\n" + "|---" * (6 + len(tasks)) + "|"
    )
    expected = truth_of(correlation) if correlation is not None else None
    for name in MODELS:
        mine = [run for run in runs if run.name == runs[list(MODELS).index(name)].name]
        results = [actual[run.name, run.seed] for run in mine]
        cells = [cell([result["test"].get(metric) for result in results], best.get(metric)) for metric in ranking]
        aucs = [{task: result["test"].get(f"auc/{task}") for task in tasks} for result in results]
        if expected and aucs[0]["like"] is not None:
            for known, run in zip(aucs, mine, strict=True):
                of_bundle = expected.of_bundle(run.folder / "bundle", dataset)
                known |= {key.split(" | ")[0]: value for key, value in of_bundle.items() if key.endswith("all rows")}
        cells += [cell([known[task] for known in aucs], None) for task in tasks]
        rate = sum(result["examples_per_second"] for result in results) / len(results)
        print(f"| {name} | {' | '.join(cells)} | {entropy(mine[0])} | {rate:,.0f} |", flush=True)
    if expected:
        known = {key: value for key, value in expected.best().items() if key.endswith("all rows")}
        print(f"best possible, in expectation: {', '.join(f'{key} {value:.4f}' for key, value in known.items())}")


def entropy(run: Run) -> str:
    """Mean entropy of each task's gate over valid rows, in percent of a uniform gate's."""
    gates = json.loads((run.folder / "diagnostics.json").read_text()).get("gates")
    if not gates:
        return "–"
    even = math.log(len(gates["mean_weight"][gates["tasks"][0]]))
    return ", ".join(f"{task} {nats / even:.0%}" for task, nats in gates["entropy_nats"].items())
