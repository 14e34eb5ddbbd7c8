"""`python -m trainer.export run=RUN output=DIR`: export the encoder as a torch.export program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from etl.runtime.options import option, read_options, run_program


@dataclass
class ExportConfig:
    """Options of `python -m trainer.export`."""

    run: str = option(MISSING, "finished run folder of a session model")
    output: str = option(MISSING, "folder to make")
    data: str | None = option(None, "the run's dataset, if that has moved")
    overwrite: bool = option(False, "replace an existing export")


def job(options: list[str]) -> None:
    """Export the encoder of a run."""
    config = read_options(ExportConfig, "trainer.conf.export", options)
    from trainer.inference.encoder_program import export_encoder  # imports torch

    export_encoder(config)
    print(config.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.export", ExportConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
