"""`python -m trainer.serve run=RUN result=RESULT`: HTTP recommendations, a demo page and a JSON API."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from etl.runtime.options import read_options, run_program
from trainer.program_configs import ServeConfig


def job(options: list[str]) -> None:
    """Serve until the process is terminated."""
    config = read_options(ServeConfig, None, options)

    from trainer.serving.app import serve  # imports torch and FAISS

    serve(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.serve", ServeConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
