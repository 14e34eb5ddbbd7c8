"""`python -m trainer.apply run=RUN data=DIR output=BUNDLE`: score other logs with a trained run.

The other dataset is made with `items_from`, so that its items are those the run knows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from etl.command import option, read_options, run_program
from etl.contract import MANIFEST, Dataset, open_dataset
from etl.folder import InputError
from etl.remote import place, published, refuse_output
from trainer import checkpoint
from trainer.config import TrainerConfig
from trainer.export import export
from trainer.family import family_of
from trainer.show import load_selected, open_run
from trainer.world import World, set_threads


@dataclass
class ApplyConfig:
    """Options of `python -m trainer.apply`."""

    run: str = option(MISSING, "finished run folder")
    data: str = option(MISSING, "dataset to score, made with items_from=the run's dataset")
    output: str = option(MISSING, "bundle folder to make")
    trained_on: str | None = option(None, "the run's dataset, if that has moved")
    overwrite: bool = option(False, "replace an existing bundle")


def apply(options: ApplyConfig) -> None:
    """Write the bundle of another dataset.

    A refit run scores with the refit's parameters. Valid parts are written in any case: whether the run was trained on
    these clicks only the user can know.

    Raises:
        InputError: no finished run, or a dataset whose items or lengths the run does not know.
    """
    world = World.alone()
    set_threads(world)
    given: dict[str, Any] = {"overwrite": options.overwrite, "is_whole": is_bundle, "last": MANIFEST}
    refuse_output(options.output, **given)
    config, trained_on = open_run(options.run, options.trained_on)
    dataset = open_dataset(options.data)
    check(config, trained_on, dataset)
    family = family_of(config, trained_on, world)
    stepper = family.stepper(total_steps=1)
    run = place(options.run)
    refit = checkpoint.latest(run / "checkpoints-refit") if config.train.refit else None
    if refit:
        checkpoint.load(refit, stepper)
    else:
        load_selected(run, stepper)
    with published(options.output, **given) as folder:
        export(folder, family.scorer(stepper), dataset, world, model=family.name, refit=False)


def is_bundle(path: Path) -> bool:
    """Whether a folder is a whole bundle."""
    return (path / MANIFEST).is_file()


def check(config: TrainerConfig, trained_on: Dataset, dataset: Dataset) -> None:
    """Raise `InputError` where a run cannot score a dataset."""
    before, now = (d.items(["item_id"])["item_id"].to_numpy() for d in (trained_on, dataset))
    if not np.array_equal(before, now):
        raise InputError(
            f"the {len(before)} items that the run knows",
            f"{len(now)} others",
            f"make it with items_from={config.data}",
        )
    if bool(dataset.row_files) != bool(trained_on.row_files):
        raise InputError(
            f"a dataset like scenario {trained_on.manifest.scenario}", dataset.manifest.scenario, "give it"
        )
    if not config.ranks and dataset.manifest.max_clicks > config.network.positions:
        most = config.network.positions
        raise InputError(f"sessions of at most {most} clicks", dataset.manifest.max_clicks, "lower protocol.max_clicks")


def job(options: list[str]) -> None:
    """Write the bundle that the options ask for."""
    config = read_options(ApplyConfig, "trainer.conf.apply", options)
    apply(config)
    print(config.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.apply", ApplyConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
