"""`python -m retrieval.compare`: compare results over the same queries, with confidence intervals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.options import option, read_options, run_program


@dataclass
class CompareConfig:
    """Options of `python -m retrieval.compare`."""

    results: list[str] = option(MISSING, "result folders of one dataset; the first one's model is compared with")
    output: str = option(MISSING, "HTML page to write; the same as JSON is next to it")
    metrics: list[str] = option(["hr@10", "ndcg@10"], "hr@k, ndcg@k, mrr@k with cutoffs of the results")


def job(options: list[str]) -> None:
    """Compare, write the page and its JSON, print the table."""
    config = read_options(CompareConfig, None, options)
    if len(config.results) < 1 or not config.metrics:
        raise InputError("at least one result and one metric", "none", "write results=[A,B]")
    if len(set(config.metrics)) < len(config.metrics):
        raise InputError("each metric once", config.metrics, "write metrics=[hr@10,ndcg@10]")
    if "://" in config.output:
        raise InputError("a path for output, as this program writes no URIs", config.output, "write a file and copy it")
    output = Path(config.output)
    if output.suffix != ".html":
        raise InputError("an output that ends in .html", output, "write output=comparison.html")
    from retrieval.report.comparison import write_comparison

    print(write_comparison(config.results, config.metrics, output))
    print(f"page: {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("retrieval.compare", CompareConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
