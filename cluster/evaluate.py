"""`python -m cluster.evaluate …`: the evaluation of `python -m retrieval` as Ray tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from etl.runtime.options import run_program
from retrieval.config import RetrievalConfig, load
from retrieval.result_folder import REPORT


def job(options: list[str]) -> None:
    """Evaluate a bundle and print the table."""
    config = load(options)
    # Imports Ray, faiss and matplotlib, which takes seconds: after the options are checked.
    from cluster.ray_evaluation import evaluate_on_ray
    from etl.runtime.object_store import absolute, local_path
    from retrieval.report.page import table_text

    for name in ("bundle", "data", "output"):  # tasks run in other working folders
        setattr(config, name, absolute(getattr(config, name)))
    print(table_text(evaluate_on_ray(config)))
    print(f"report: {local_path(config.output) / REPORT}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("cluster.evaluate", RetrievalConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
