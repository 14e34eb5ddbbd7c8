"""`python -m trainer.export run=RUN output=DIR`: export the encoder as a torch.export program."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from etl.runtime.options import read_options, run_program
from trainer.program_configs import ExportConfig


def job(options: list[str]) -> None:
    """Export the encoder of a run."""
    config = read_options(ExportConfig, None, options)
    from trainer.encoder_program import export_encoder  # imports torch

    export_encoder(config)
    print(config.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.export", ExportConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
