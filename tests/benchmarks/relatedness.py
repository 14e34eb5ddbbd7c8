"""Does training the sparse tasks together help, where they are related and where they are not?

AUCs are in expectation over labels (`expected.py`). Each seed is a log of its own, trained on with that seed, so
that the test over seeds speaks of such logs and not of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import ttest_rel

from tests.benchmarks.expected import ACTIONS
from tests.benchmarks.models import Run, cell, execute, truth_of, twin, twin_options

MODEL = "model=rank_mmoe"
"""Ranking models see the categories, without which the twin's likes can hardly be told."""


def relatedness(seeds: Sequence[int] = (0, 1, 2)) -> None:
    """`rank_mmoe` with all tasks against the same network with one; each is selected by its valid AUC."""
    options = (MODEL, *twin_options(MODEL))
    for correlation in (1, 0):
        values: dict[str, list[dict[str, float]]] = {"joint": [], "separate": [], "best": []}
        for seed in seeds:
            data, truth = twin(correlation, seed=seed), truth_of(correlation, seed)
            joint = Run("joint", data, options, seed)
            alone = {task: Run(f"alone-{task}", data, (*options, f"tasks=[{task}]"), seed) for task in ACTIONS}
            execute([joint, *alone.values()], search=False)
            values["best"].append(truth.best())
            values["joint"].append(truth.of_bundle(joint.folder / "bundle"))
            separate = [truth.of_bundle(run.folder / "bundle", [task]) for task, run in alone.items()]
            values["separate"].append({key: value for found in separate for key, value in found.items()})
        print(f"\ntask_correlation={correlation}: expected test AUC, mean ± standard deviation of {len(seeds)} logs")
        print("| task | over | joint | separate | best possible | joint − separate | paired t, two-sided p |")
        print("|---" * 7 + "|")
        for key in values["best"][0]:
            by_name = {name: [found[key] for found in of_seed] for name, of_seed in values.items()}
            gain = np.subtract(by_name["joint"], by_name["separate"])
            p = ttest_rel(by_name["joint"], by_name["separate"]).pvalue
            cells = (cell(list(by_name[name]), None) for name in ("joint", "separate", "best"))
            each = ", ".join(f"{g:+.4f}" for g in gain)
            print(f"| {key} | {' | '.join(cells)} | {gain.mean():+.4f} ({each}) | {p:.3f} |", flush=True)
