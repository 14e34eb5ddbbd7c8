"""`python -m trainer.plan data=DIR model=hybrid workers=64 …`: estimated time and memory of an epoch on N workers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from etl.runtime.option_checks import check_values
from etl.runtime.options import option, read_options, run_program
from trainer.config import TrainerConfig, load


@dataclass
class PlanConfig(TrainerConfig):
    """Options of `python -m trainer.plan`: all of `python -m trainer`, and its own."""

    output: str = option("plan", "not written")
    workers: int = option(8, "workers to plan for", at_least=1)
    items: int = option(0, "items to plan the memory of tables for; 0 = the dataset's", at_least=0)
    network_gbit: float = option(10.0, "speed of the network between them, in Gbit/s", above=0)
    latency_us: float = option(50.0, "time of a small message between two workers, in microseconds", above=0)
    cores: int = option(1, "cores of a worker", at_least=1)
    measured_steps: int = option(20, "steps that are measured", at_least=1)


OWN_OPTIONS = {field.name for field in fields(PlanConfig)} - {field.name for field in fields(TrainerConfig)}
"""Options that `python -m trainer` does not have."""


def job(options: list[str]) -> None:
    """Print the plan."""
    plan_config = read_options(PlanConfig, "trainer.conf", options)
    check_values(plan_config)
    arguments = [option for option in options if option.partition("=")[0] not in OWN_OPTIONS]
    arguments += [f"output={plan_config.output}", "ray.workers=0"]
    config = load(arguments)
    from trainer.prepare import resolve_config  # imports torch
    from trainer.step_cost import plan

    config, _ = resolve_config(arguments, config)
    print("\n".join(plan(plan_config, config)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.plan", PlanConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
