"""`python -m trainer.plan data=DIR model=hybrid workers=64 …`: estimated time and memory of an epoch on N workers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from etl.runtime.errors import InputError
from etl.runtime.options import option, run_program
from trainer.config import TrainerConfig, load

OWN = ("workers", "items", "network_gbit", "latency_us", "cores", "measured_steps")


@dataclass
class PlanConfig(TrainerConfig):
    """Options of `python -m trainer.plan`: all of `python -m trainer`, and its own."""

    output: str = option("plan", "not written")
    workers: int = option(8, "workers to plan for")
    items: int = option(0, "items to plan the memory of tables for; 0 = the dataset's")
    network_gbit: float = option(10.0, "speed of the network between them, in Gbit/s")
    latency_us: float = option(50.0, "time of a small message between two workers, in microseconds")
    cores: int = option(1, "cores of a worker")
    measured_steps: int = option(20, "steps that are measured")


def job(options: list[str]) -> None:
    """Print the plan."""
    own = {name: text for name, _, text in (o.partition("=") for o in options) if name in OWN}
    plan_options = PlanConfig(data="", model="")
    for name, text in own.items():
        kind = float if name in ("network_gbit", "latency_us") else int
        try:
            setattr(plan_options, name, kind(text))
        except ValueError:
            raise InputError(f"a number for {name}", repr(text), f"for example {name}=8") from None
        if not 0 < getattr(plan_options, name) < float("inf"):
            raise InputError(f"{name} above 0", text, "1 is always valid")
    arguments = [o for o in options if o.partition("=")[0] not in OWN]
    if not any(o.startswith("output=") for o in arguments):
        arguments.append("output=plan")
    arguments.append("ray.workers=0")
    config = load(arguments)
    from trainer.prepare import resolve_config  # imports torch
    from trainer.step_cost import plan

    config, _ = resolve_config(arguments, config)
    print("\n".join(plan(plan_options, config)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.plan", PlanConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
