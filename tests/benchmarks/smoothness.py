"""When vectors beat counting: QB-video twins in which similar items share transitions to different degrees."""

from __future__ import annotations

import json

from tests.benchmarks.models import SMOOTHNESS, Run, best_possible, cell, execute, twin

BASELINES = ("popularity", "markov", "sequential_rules", "item_knn", "v_sknn", "stan")
METRICS = ("hr@10", "hr@20", "ndcg@20")


def smoothness() -> None:
    """One line per twin and ranker: test metrics, in brackets the share of the best possible."""
    print("QB-video twin, test; in brackets the share of the best possible")
    print(f"| successor_smoothness | ranker | {' | '.join(METRICS)} |\n" + "|---" * (len(METRICS) + 2) + "|")
    for value in (0.0, SMOOTHNESS, 1.0):
        data = twin(0.5, smoothness=value)
        options = ("recipe=small", "model=gru4rec", "train.early_stopping_patience=2")
        run = Run("smoothness-gru4rec", data, options, evaluation=(f"baselines=[{','.join(BASELINES)}]", "blend=auto"))
        result = execute([run])[run.name, 0]
        truth = best_possible(data)
        rows = {name: result["baselines"][name]["test"] for name in BASELINES}
        rows |= {"gru4rec": result["test"], "blend": result["blend"]["test"]}
        for name, test in rows.items():
            cells = [cell([test.get(metric)], truth.get(metric)) for metric in METRICS]
            print(f"| {value} | {name} | {' | '.join(cells)} |", flush=True)
        diagnosis = json.loads((data / "statistics.json").read_text())["transitions"]
        print(f"  transitions: {diagnosis}", flush=True)
