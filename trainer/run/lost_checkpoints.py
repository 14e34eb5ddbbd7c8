"""After a full disk: the best epoch among those whose checkpoints were written."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from etl.runtime.options import SYSTEM_ERRORS
from trainer.distributed.world import World
from trainer.run.checkpoint import STATE, latest, lost_steps, problem_of, read_progress
from trainer.run.metrics_log import METRICS, read_metrics
from trainer.run.progress import Progress
from trainer.run.run_folder import RunFolder


def replace_lost_best(folder: Path, run: RunFolder, metric: str, progress: Progress, world: World) -> None:
    """Let `progress` name the best epoch on the disk if the checkpoint of the best one was lost. Collective.

    The first worker decides. The loss may have been before a restart.

    Args:
        folder: folder of the checkpoints.
        run: the run.
        metric: the metric that selects the best epoch.
        progress: the progress at the end of training.
        world: the workers.

    Raises:
        InputError: no epoch has a checkpoint; on all workers.
    """
    found: Progress | InputError = progress
    if world.is_first and lost_steps(folder, progress):
        try:
            found = best_on_disk(folder, run.path / METRICS, metric, progress)
            run.push_checkpoint()  # otherwise the next download restores the former record
        except InputError as error:
            found = error
    found = world.gather(found)[0]
    if isinstance(found, InputError):
        raise found
    vars(progress).update(vars(found))


def best_on_disk(folder: Path, metrics: Path, metric: str, progress: Progress) -> Progress:
    """The progress with the best epoch whose checkpoint is intact, also recorded in the newest checkpoint.

    Feedback tasks whose own best epoch is lost are scored by that one.

    Args:
        folder: folder of the checkpoints.
        metrics: the run's `metrics.jsonl`.
        metric: the metric that selects the best epoch.
        progress: the progress at the end of training.

    Raises:
        InputError: no epoch has a checkpoint.
    """
    intact = {path: read_progress(path) for path in sorted(folder.glob("step-*")) if problem_of(path) is None}
    steps = {state.step for state in intact.values()}
    if progress.best_steps <= steps:
        return progress
    if progress.best_step not in steps:
        of_epoch = {
            line["epoch"]: line["value"]
            for line in read_metrics(metrics)
            if (line["split"], line["name"]) == ("valid", metric) and line["value"] is not None
        }
        ends = [state for state in intact.values() if state.sample == 0 and state.epoch in of_epoch]
        if not ends:
            expected = f"{SYSTEM_ERRORS[1]} for the checkpoint of an epoch"
            raise InputError(expected, f"none in {folder}", "free disk space, run again")
        best = max(ends, key=lambda state: of_epoch[state.epoch])
        lost = f"the checkpoint of the best epoch, {progress.best_epoch}, is lost"
        print(f"warning: {lost}: taking epoch {best.epoch}", file=sys.stderr, flush=True)
        progress = replace(progress, best_epoch=best.epoch, best_step=best.step, best_score=of_epoch[best.epoch])
    kept = {task: best for task, best in progress.best_by_task.items() if best[1] in steps}
    progress = replace(progress, best_by_task=kept)
    newest = latest(folder)
    assert newest is not None, "an intact checkpoint exists"
    best_fields = ("best_epoch", "best_step", "best_score", "best_by_task")
    state = json.loads((newest / STATE).read_text())
    state["progress"] |= {name: value for name, value in asdict(progress).items() if name in best_fields}
    write_json(newest / STATE, state)
    return progress
