"""One session of a request: parsed from JSON and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from etl.dataset import FEEDBACK_BIT
from etl.runtime.errors import InputError

ANONYMOUS = -1
"""User id of anonymous sessions; not in any log."""
ALL_ACTIONS = sum(1 << bit for name, bit in FEEDBACK_BIT.items() if name != "click")
HINT = 'send {"sessions": [{"items": [RAW_ID, …]}]}'


@dataclass(frozen=True)
class SessionRequest:
    """A session of a request.

    Attributes:
        items: raw item ids, oldest first; unknown ones are left out and reported.
        user_id: excludes the user's own train session from the neighbours; `ANONYMOUS` = none.
        feedback: outcome bits of each click, as in the dataset; read with `network.past_actions` and by feedback
            towers with `network.feedback_actions`. Default: no actions.
        watching_times: visit count of each click; read with `network.past_actions`.
        n_clicks: number of clicks before truncation.
        gender, age: codes of the log, -1 = unknown.
    """

    items: list[int]
    user_id: int = ANONYMOUS
    feedback: list[int] = field(default_factory=list)
    watching_times: list[int] = field(default_factory=list)
    n_clicks: int | None = None
    gender: int = -1
    age: int = -1

    @classmethod
    def parse(cls, value: Any) -> SessionRequest:
        """Parse a session: a list of raw item ids, or an object with the attributes above.

        Raises:
            InputError: an unknown key, a wrong type, or lists of different lengths.
        """
        fields = {"items": value} if isinstance(value, list) else value
        if not isinstance(fields, dict) or "items" not in fields:
            raise InputError("a session with items", _short(value), HINT)
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise InputError(f"keys of {', '.join(cls.__dataclass_fields__)}", sorted(unknown)[0], HINT)
        for name, entry in fields.items():
            is_list = name in ("items", "feedback", "watching_times")
            values = entry if is_list and isinstance(entry, list) else [entry]
            right = all(type(v) is int and -(2**63) <= v < 2**63 for v in values)
            if not right or is_list != isinstance(entry, list):
                raise InputError(f"{name} as {'a list of integers' if is_list else 'an integer'}", _short(entry), HINT)
        made = cls(**fields)
        for name in ("feedback", "watching_times"):
            if len(getattr(made, name)) not in (0, len(made.items)):
                raise InputError(f"{name} for each of {len(made.items)} items", len(getattr(made, name)), HINT)
        made._check_values()
        return made

    def _check_values(self) -> None:
        checks = {
            f"feedback of 0 to {ALL_ACTIONS}": all(0 <= value <= ALL_ACTIONS for value in self.feedback),
            "watching_times of at least 0": min(self.watching_times, default=0) >= 0,
            "n_clicks of at least 1": self.n_clicks is None or self.n_clicks >= 1,
        }
        for wrong in (expected for expected, right in checks.items() if not right):
            raise InputError(wrong, _short(getattr(self, wrong.split()[0])), HINT)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"
