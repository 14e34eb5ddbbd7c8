"""Joint training of sparse tasks, when they are related and when they are not.

AUCs are in expectation over labels (`expected.py`). Each seed has its own log, trained on with that seed, so
that the test over seeds is about such logs and not about one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy.stats import ttest_ind, ttest_rel

from etl.dataset import open_dataset
from etl.runtime.arrays import FloatArray
from tests.benchmarks.expected import ACTIONS, Truth
from tests.benchmarks.models import Run, cell, execute, truth_of, twin, twin_options
from trainer.distributed.world import World
from trainer.finished_run import open_run
from trainer.inference.export import export
from trainer.run import checkpoint
from trainer.run.run_folder import RunFolder
from trainer.task.registry import model_task_of

MODEL = "model=rank_mmoe"
"""Ranking models see the categories, without which the twin's likes are hard to predict."""
EVERY_EPOCH = ("train.early_stopping_patience=6", "train.keep_checkpoints=6")
COMPARED = {
    "separate": "selected by its valid AUC, as joint training is by the mean of its tasks'",
    "in hindsight": "the epoch of the highest test AUC, better than any selection could find",
}
"""Forty valid shares select poorly: the loss of a separate run by that is not a gain of training tasks together."""


def relatedness(seeds: Sequence[int] = (0, 1, 2)) -> None:
    """`rank_mmoe` with all tasks against the same network with one."""
    options = (MODEL, *twin_options(MODEL))
    gains: dict[tuple[str, int], dict[str, FloatArray]] = {}
    for correlation in (1, 0):
        values: dict[str, list[dict[str, float]]] = {"best": [], "joint": [], **{name: [] for name in COMPARED}}
        for seed in seeds:
            data, truth = twin(correlation, seed=seed), truth_of(correlation, seed)
            joint = Run("joint", data, options, seed)
            separate = {
                task: Run(f"separate-{task}", data, (*options, *EVERY_EPOCH, f"tasks=[{task}]"), seed)
                for task in ACTIONS
            }
            execute([joint, *separate.values()], search=False)
            values["best"].append(truth.best())
            dataset = open_dataset(data)
            values["joint"].append(truth.of_bundle(joint.folder / "bundle", dataset))
            selected, highest = dict[str, float](), dict[str, float]()
            for task, run in separate.items():
                selected |= truth.of_bundle(run.folder / "bundle", dataset, [task])
                epochs = of_epochs(run, truth, task)
                highest |= {key: max(actual[key] for actual in epochs) for key in epochs[0]}
            values["separate"].append(selected)
            values["in hindsight"].append(highest)
        for name, selection in COMPARED.items():
            print(f"\ntask_correlation={correlation}, expected test AUC over {len(seeds)} logs; separate: {selection}")
            gains[name, correlation] = table(values, name)
    for name in COMPARED:
        print(f"\njoint − separate ({name}), related less unrelated tasks; Welch's t over the logs, two-sided p")
        for key, related in gains[name, 1].items():
            unrelated = gains[name, 0][key]
            p = ttest_ind(related, unrelated, equal_var=False).pvalue
            print(f"| {key} | {related.mean() - unrelated.mean():+.4f} | {p:.3f} |", flush=True)


def table(values: dict[str, list[dict[str, float]]], name: str) -> dict[str, FloatArray]:
    """One line per task and kind of row: means ± standard deviations, each log's gain, a paired t-test.

    Returns:
        The gains of the logs, keyed by the line's first two cells.
    """
    gains = {}
    print("| task | over | joint | separate | best possible | joint − separate | paired t, two-sided p |")
    print("|---" * 7 + "|")
    for key in values["best"][0]:
        joint, separate, best = ([actual[key] for actual in values[n]] for n in ("joint", name, "best"))
        gain, p = np.subtract(joint, separate), ttest_rel(joint, separate).pvalue
        cells = " | ".join(cell(list(of_logs), None) for of_logs in (joint, separate, best))
        each = ", ".join(f"{g:+.4f}" for g in gain)
        print(f"| {key} | {cells} | {gain.mean():+.4f} ({each}) | {p:.3f} |", flush=True)
        gains[key] = gain
    return gains


def of_epochs(run: Run, truth: Truth, task: str) -> list[dict[str, float]]:
    """Expected test AUCs of a task after each epoch whose checkpoint a finished run has retained, in order."""
    config, dataset = open_run(str(run.folder), None)
    world, actual = World.alone(), []
    model_task = model_task_of(config, dataset, world)
    train_step = model_task.train_step(total_steps=1)
    for path in sorted((run.folder / "checkpoints").glob("step-*")):
        checkpoint.load(path, train_step)
        with TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            # As for a refit, whose bundle has no valid parts: only the test rows are needed.
            export(RunFolder(bundle), model_task.scorer(train_step), dataset, world, model=model_task.name, refit=True)
            actual.append(truth.of_bundle(bundle, dataset, [task]))
    return actual
