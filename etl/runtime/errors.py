"""`InputError`: the error that a user can fix."""

from __future__ import annotations


class InputError(Exception):
    """Wrong input or option: shown as one line without traceback, exit status 2."""

    def __init__(self, expected: str, got: object, hint: str) -> None:
        self.expected, self.got, self.hint = expected, got, hint
        super().__init__(f"expected {expected}, got {got} ({hint})")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str]]:
        # Pickled by Spark and Ray, which rebuild exceptions from their arguments.
        return InputError, (self.expected, self.got, self.hint)
