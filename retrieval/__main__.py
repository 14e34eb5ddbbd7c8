"""`python -m retrieval`: a bundle → a result folder."""

import sys
from collections.abc import Sequence

from etl.command import run_program
from retrieval.config import RetrievalConfig, load
from retrieval.result_folder import REPORT


def job(options: list[str]) -> None:
    """Evaluate the bundle that the options name and print the table."""
    config = load(options)
    from etl.remote import place  # these import faiss, scipy and matplotlib: --help and wrong options need none
    from retrieval.evaluate import evaluate
    from retrieval.report import table_text

    result = evaluate(config)
    print(table_text(result))
    print(f"report: {place(config.output) / REPORT}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("retrieval", RetrievalConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
