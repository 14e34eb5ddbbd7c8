"""`recipe=auto`: if a catalogue size has several recipes, trains each for some epochs and selects on valid."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from etl.dataset import TRAIN_HOLDOUT, Dataset, open_dataset
from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from trainer.config import TrainerConfig
from trainer.prepare import RECIPE_CHOICE, RECIPE_TRIALS, check_output, prepare, read_config
from trainer.recipe import recipes_to_try, with_recipe
from trainer.run.folder import CHECKPOINTS, CONFIG
from trainer.run.progress_file import progress_bar
from trainer.run.run_folder import RunFolder
from trainer.run.signals import on_sigterm
from trainer.tuning.trial import FINISHED, Trial

ALONE = ("ray.workers=0", "ray.use_gpu=false", "train.precision=float32", "train.profile=false")
"""Trials run in the launching process, whatever workers the run has."""


def resolve_auto_recipe(options: Sequence[str], loaded_config: TrainerConfig) -> tuple[list[str], TrainerConfig]:
    """Resolve `recipe=auto`: the options with the chosen recipe, and the configuration loaded from them.

    A resumed run keeps its recipe. Otherwise recipes are tried one after another in a folder inside the run, where the
    same command resumes if killed. The results are written to `RUN/recipe_choice.json`.

    Args:
        options: the command line.
        loaded_config: the result of `load(options)`.

    Raises:
        InputError: options, dataset or output that the user must fix.
        Stopped: on SIGTERM, after a checkpoint is saved.
    """
    if loaded_config.recipe != "auto":
        return list(options), loaded_config
    run = RunFolder.of(loaded_config.output)
    if run.mirror:
        with run.locked():  # not while another process trains in the local copy
            run.pull(checkpoints=False)
    if (run.path / CONFIG).is_file():
        recipe = read_config(run.path / CONFIG).get("recipe", "auto")
    else:
        dataset = open_dataset(loaded_config.data, verify=False)
        n_items = dataset.manifest.n_items
        candidates = _candidates(options, loaded_config, n_items)
        recipe = candidates[0]
        config = with_recipe([*options, f"recipe={recipe}"], n_items, replace(loaded_config, recipe=recipe))
        epochs = trial_epochs(config, dataset)
        if len(candidates) > 1 and epochs:
            check_output(run.path, dataset)
            recipe = _choose(options, config, candidates, epochs, run)
    return [*options, f"recipe={recipe}"], replace(loaded_config, recipe=recipe)


def _candidates(options: Sequence[str], loaded_config: TrainerConfig, n_items: int) -> list[str]:
    """The recipes to try: those that accept the options, with the requested loss if any; else only the first."""
    names = recipes_to_try(loaded_config, n_items)
    without_loss = [option for option in options if not option.startswith("loss=")]

    def loss(options: Sequence[str], name: str) -> str:
        return with_recipe([*options, f"recipe={name}"], n_items, replace(loaded_config, recipe=name)).loss

    def fits(name: str) -> bool:
        try:
            chosen = loss(options, name)
            return len(without_loss) == len(options) or chosen == loss(without_loss, name)
        except InputError:  # for example an option that this recipe's loss does not support
            return False

    return [name for name in names if fits(name)] or names[:1]


def trial_epochs(config: TrainerConfig, dataset: Dataset) -> int:
    """Epochs of a trial: enough for `auto.targets`, between two and half of the run's; 0 if that is impossible.

    On small datasets it takes more epochs until the best recipe is apparent.
    """
    counts = dataset.manifest.counts
    targets = max(1, counts.get("clicks", 0) - (1 + TRAIN_HOLDOUT) * counts.get("sessions", 0))
    min_epochs, max_epochs = 2, config.train.epochs // 2
    if not config.auto.targets or max_epochs < min_epochs:
        return 0
    return min(max(min_epochs, -(-config.auto.targets // targets)), max_epochs)


def _choose(options: Sequence[str], config: TrainerConfig, candidates: list[str], epochs: int, run: RunFolder) -> str:
    """Try the recipes, write their results, and return the best; the first on ties."""
    metric, trials = config.select_by, list[Trial]()
    with run.locked():
        for number, recipe in enumerate(candidates):
            folder = run.path / RECIPE_TRIALS / recipe
            fixed = [f"recipe={recipe}", f"output={folder}", f"train.epochs={epochs}", *ALONE]
            trials.append(Trial(number, folder, {"recipe": recipe}, [*options, *fixed]))
            _forget_other_epochs(folder, epochs)
            prepare(trials[-1].options)  # rejects options other than those a killed trial began with
        for trial in trials:
            _run(trial, epochs)
        rows = [{**trial.setting, **trial.ended()} for trial in trials]
        scores = [row.get("valid", {}).get(metric) or 0.0 for row in rows]
        best = candidates[scores.index(max(scores))]
        choice = {"recipe": best, "metric": metric, "epochs": epochs, "seed": config.seed, "tried": rows}
        write_json(run.path / RECIPE_CHOICE, choice)
        run.send(RECIPE_CHOICE)
    for trial in trials:
        shutil.rmtree(trial.folder / CHECKPOINTS, ignore_errors=True)
    reached = ", ".join(
        f"{row['recipe']} {score:.4f}" if row["state"] == FINISHED else f"{row['recipe']} {row['state']}"
        for row, score in zip(rows, scores, strict=True)
    )
    print(f"recipe=auto: {best} (valid {metric} after {epochs} epochs: {reached})", flush=True)
    return best


def _forget_other_epochs(folder: Path, epochs: int) -> None:
    """Remove a trial of another number of epochs, which was killed or ended before options changed that may change."""
    if (folder / CONFIG).is_file() and read_config(folder / CONFIG)["train"]["epochs"] != epochs:
        shutil.rmtree(folder)


def _run(trial: Trial, epochs: int) -> None:
    """Train a trial, resuming if it was interrupted."""
    if trial.ended():
        return
    print(f"recipe=auto: trying {trial.setting['recipe']} for {epochs} epochs", file=sys.stderr, flush=True)
    with progress_bar(trial.folder), on_sigterm(RunFolder(trial.folder)):
        trial.run(lambda _: None)
