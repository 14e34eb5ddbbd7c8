"""`python -m trainer.serve run=RUN result=RESULT`: HTTP recommendations, a demo page and a JSON API."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from etl.runtime.options import option, read_options, run_program


@dataclass
class ServeConfig:
    """Options of `python -m trainer.serve`."""

    run: str = option(MISSING, "finished run folder of a session model")
    result: str = option(MISSING, "result folder of the run's bundle")
    data: str | None = option(None, "the run's dataset, if that has moved")
    port: int = option(8000, "port on the loopback interface; 0 = any free port", at_least=0, at_most=65_535)
    titles: str | None = option(None, "file with the columns item_id, title; default: that of the evaluation")
    threads: int = option(0, "threads of encoder and search; 0 = one for each core", at_least=0)


def job(options: list[str]) -> None:
    """Serve until the process is terminated."""
    config = read_options(ServeConfig, "trainer.conf.serve", options)
    from etl.runtime.option_checks import check_values

    check_values(config)
    from trainer.serving.app import serve  # imports torch and FAISS

    serve(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.serve", ServeConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
