"""`python -m cluster`: submit and chain the three programs."""

import sys
from collections.abc import Sequence

from cluster import kubernetes, local
from cluster.config import ClusterConfig, load
from cluster.pipeline import run_pipeline
from cluster.submit import submit
from etl.runtime.options import run_program

ACTIONS = {"up": local.up, "down": local.down, "status": local.status}


def job(options: list[str]) -> None:
    """Run the requested action."""
    config = load(options)
    if config.action:
        print("\n".join(ACTIONS[config.action](config.local)))
    elif config.submit and config.target == "kubernetes":
        print("\n".join(kubernetes.submit(config, options)))
    elif config.submit:
        if status := submit(config, options):
            raise SystemExit(status)
    elif config.pipeline.name == "study":
        from cluster.study.run import run_study  # imports matplotlib and scipy

        print(run_study(config.study))
    else:
        print(run_pipeline(config.pipeline))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("cluster", ClusterConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
