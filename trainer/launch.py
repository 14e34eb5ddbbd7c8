"""From a checked command line to a finished run: in this process, or with Ray's workers."""

import errno
import json
import sys

from etl.runtime.errors import InputError
from etl.runtime.locks import locked
from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.loop import train
from trainer.prepare import prepare
from trainer.run.folder import SUMMARY
from trainer.run.metrics_log import progress_bar
from trainer.run.object_store import RunFolder
from trainer.run.signals import INTERRUPTED, STATUS, Stopped, on_sigterm
from trainer.training.step import NotFiniteError


def launch(options: list[str], asked: TrainerConfig) -> None:
    """Train, or go on training, the run that the options describe, and print its best epoch.

    Args:
        options: the command line.
        asked: what `trainer.config.load` made of it.

    Raises:
        InputError: what the user must fix.
        SystemExit: the run was stopped and has saved its state.
    """
    config, finished = prepare(options, asked)
    folder = RunFolder.of(config.output)
    run = folder.path
    if not finished:
        with locked(run), progress_bar(run):
            try:
                if config.ray.workers:
                    from trainer.ray_train import run_with_ray

                    run_with_ray(config)
                else:
                    with on_sigterm(folder):
                        train(config, World.alone())
            except Stopped as stopped:
                print(stopped, file=sys.stderr, flush=True)
                raise SystemExit(STATUS) from None
            except KeyboardInterrupt:
                print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
                raise SystemExit(INTERRUPTED) from None
            except NotFiniteError as error:
                raise error.as_input_error() from None
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise InputError(f"room on the disk of {run}", "a full disk", "free some and run again") from None
    summary = json.loads((run / SUMMARY).read_text())
    valid = "  ".join(f"{name} {value:.4f}" for name, value in summary["valid"].items() if value is not None)
    state = "already finished" if finished else f"{summary['examples_per_second']:,.0f} events/s"
    print(f"best epoch {summary['best_epoch']}: valid {valid} ({state}): {config.output}")
