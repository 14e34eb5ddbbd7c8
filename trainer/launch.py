"""Launches a training run: in this process, or on Ray's workers."""

import errno
import json
import sys

from etl.runtime.errors import InputError
from etl.runtime.object_store import local_path
from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.loop import train
from trainer.prepare import prepared
from trainer.run.folder import SUMMARY
from trainer.run.progress_file import progress_bar
from trainer.run.run_folder import RunFolder
from trainer.run.signals import INTERRUPTED, STATUS, Stopped, on_sigterm
from trainer.training.step import NotFiniteError
from trainer.tuning.auto import resolve_auto_recipe
from trainer.unread_options import warn_about_unread


def launch(options: list[str], loaded_config: TrainerConfig) -> None:
    """Train, or resume training, the run that the options describe, and print its best epoch.

    Args:
        options: the command line.
        loaded_config: the result of `trainer.config.load(options)`.

    Raises:
        InputError: an error that the user must fix.
        SystemExit: the run was stopped and has saved its state.
    """
    try:
        options, loaded_config = resolve_auto_recipe(options, loaded_config)
        with prepared(options, loaded_config) as (config, finished):
            if not finished:
                warn_about_unread(options, config)
                _train(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        raise SystemExit(STATUS) from None
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except NotFiniteError as error:
        raise error.as_input_error() from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = local_path(loaded_config.output)
        raise InputError(f"room on the disk of {where}", "a full disk", "free space, run again") from None
    summary = json.loads((local_path(config.output) / SUMMARY).read_text())
    valid = "  ".join(f"{name} {value:.4f}" for name, value in summary["valid"].items() if value is not None)
    state = "already finished" if finished else f"{summary['examples_per_second']:,.0f} events/s"
    print(f"best epoch {summary['best_epoch']}: valid {valid} ({state}): {config.output}")


def _train(config: TrainerConfig) -> None:
    """Train a prepared run in this process, or with Ray's workers."""
    folder = RunFolder.of(config.output)
    with progress_bar(folder.path):
        if config.ray.workers:
            from trainer.ray_train import run_with_ray

            run_with_ray(config)
        else:
            with on_sigterm(folder):
                train(config, World.alone())
