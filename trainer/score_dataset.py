"""Scores another dataset with a trained run and writes a bundle."""

from __future__ import annotations

import numpy as np

from etl.dataset import Dataset, open_dataset
from etl.runtime.errors import InputError
from etl.runtime.object_store import local_path, refuse_output, staged_output
from retrieval.bundle_folder import BUNDLE
from trainer.config import TrainerConfig
from trainer.distributed.world import World, set_threads
from trainer.finished_run import load_exported, open_run
from trainer.inference.export import export
from trainer.program_configs import ApplyConfig
from trainer.run.run_folder import RunFolder
from trainer.task.registry import model_task_of


def score_dataset(options: ApplyConfig) -> None:
    """Write the bundle of another dataset.

    A refit run scores with the refit's parameters. Valid files are always written: only the user can know whether the
    run was trained on these clicks.

    Raises:
        InputError: the run is not finished, or the dataset's items or session lengths do not match it.
    """
    world = World.alone()
    set_threads(world)
    read = [path for path in (options.run, options.data, options.trained_on) if path]
    refuse_output(options.output, BUNDLE, overwrite=options.overwrite, inputs=read)
    config, trained_on = open_run(options.run, options.trained_on)
    dataset = open_dataset(options.data)
    check(config, trained_on, dataset)
    model_task = model_task_of(config, trained_on, world)
    train_step = model_task.train_step(total_steps=1)
    passes = load_exported(local_path(options.run), config, model_task, train_step)
    with staged_output(options.output, BUNDLE, overwrite=options.overwrite, inputs=read) as folder:
        export(
            RunFolder(folder),
            model_task.scorer(train_step),
            dataset,
            world,
            model=model_task.name,
            refit=False,
            passes=passes,
        )


def check(config: TrainerConfig, trained_on: Dataset, dataset: Dataset) -> None:
    """Raise `InputError` if the run cannot score the dataset."""
    before, now = (d.items(["item_id"])["item_id"].to_numpy() for d in (trained_on, dataset))
    if not np.array_equal(before, now):
        raise InputError(
            f"the {len(before)} items that the run knows",
            f"{len(now)} others",
            f"make it with items_from={config.data}",
        )
    if bool(dataset.row_files) != bool(trained_on.row_files):
        raise InputError(
            f"a dataset like scenario {trained_on.manifest.scenario}", dataset.manifest.scenario, "name another one"
        )
    if not config.is_ranking_model and dataset.manifest.max_clicks > config.network.positions:
        longest, hint = config.network.positions, "lower protocol.max_clicks"
        raise InputError(f"sessions of at most {longest} clicks", dataset.manifest.max_clicks, hint)
