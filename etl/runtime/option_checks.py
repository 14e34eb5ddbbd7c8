"""Checks bounds and choices of options, which are declared in `option(…)` and printed by `--help`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from etl.runtime.errors import InputError


@dataclass(frozen=True)
class Bounds:
    """Bounds of an option; None = unbounded. NaN and infinity are always out of bounds.

    >>> str(Bounds(at_least=0, below=1))
    'at least 0 and below 1'
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a number is within the bounds."""
        return (
            abs(value) < float("inf")
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def nearest(self, value: float) -> str:
        """Describe the bound that `value` violates, for error hints."""
        low, high = (self.above if self.at_least is None else self.at_least), self.at_most
        if high is not None and value > high:
            return f"{high} is the maximum"
        if self.at_least is not None and not value >= self.at_least:
            return f"{self.at_least} is the minimum"
        return f"{self}" if low is None else f"a number {self}"

    def __str__(self) -> str:
        words = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        return " and ".join(f"{word} {bound}" for word, bound in words if bound is not None)


def described(field: dataclasses.Field[Any]) -> str:
    """The help text of an option with its bounds or choices."""
    text, bounds, choices = (field.metadata.get(key) for key in ("help", "bounds", "choices"))
    limits = ", ".join(map(str, choices)) if choices else str(bounds or "")
    return f"{text} ({limits})" if text and limits else text or limits


def check_values(config: Any, section: str = "") -> None:
    """Check all options of a configuration, including groups, against bounds and choices; a null default passes.

    Raises:
        InputError: a value out of bounds, or not among the choices.
    """
    for field in dataclasses.fields(config):
        name, value = f"{section}{field.name}", getattr(config, field.name)
        bounds, choices = field.metadata.get("bounds"), field.metadata.get("choices")
        if dataclasses.is_dataclass(value):
            check_values(value, f"{name}.")
        elif value is None and (field.default is None or not choices):
            continue
        elif choices and value not in choices:
            raise InputError(f"{name} one of {', '.join(map(str, choices))}", value, f"for example {name}={choices[0]}")
        elif bounds is not None and not bounds.hold(value):
            raise InputError(f"{name} of {bounds}", value, bounds.nearest(value))
