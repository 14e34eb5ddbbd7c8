"""`python -m retrieval`: a bundle → a result folder."""

import sys
from collections.abc import Sequence

from etl.runtime.options import run_program
from retrieval.config import RetrievalConfig, load
from retrieval.result_folder import REPORT


def job(options: list[str]) -> None:
    """Evaluate a bundle and print the table."""
    config = load(options)
    from etl.runtime.object_store import local_path
    from retrieval.evaluate import evaluate
    from retrieval.report.page import table_text

    result = evaluate(config)
    print(table_text(result))
    if result["verdict"]:
        print(result["verdict"])
    print(f"report: {local_path(config.output) / REPORT}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("retrieval", RetrievalConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
