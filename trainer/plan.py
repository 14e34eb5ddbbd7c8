"""`python -m trainer.plan data=DIR model=hybrid workers=64 …`: estimated time and memory of an epoch on N workers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields

from etl.runtime.options import read_options, run_program
from trainer.config import TrainerConfig, load
from trainer.program_configs import PlanConfig

OWN_OPTIONS = {field.name for field in fields(PlanConfig)} - {field.name for field in fields(TrainerConfig)}
"""Options that `python -m trainer` does not have."""


def job(options: list[str]) -> None:
    """Print the plan."""
    plan_config = read_options(PlanConfig, "trainer.conf", options)
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
