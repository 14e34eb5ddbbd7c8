"""Options in a file: `@FILE` on a command line expands to the options of a YAML map."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etl.runtime.errors import InputError

PREFIX = "@"
SPECIAL = re.compile(r"""[,'"\[\]\\]|^\s|\s$|^$""")


def expand_files(options: Sequence[str]) -> list[str]:
    """Replace each `@FILE` by the options of the file; later options of the command line win.

    Raises:
        InputError: a file cannot be read, or is not a map of options.
    """
    out: list[str] = []
    for entry in options:
        out += _read_option_file(entry.removeprefix(PREFIX)) if entry.startswith(PREFIX) else [entry]
    return out


def _read_option_file(path: str) -> list[str]:
    import yaml  # not needed for --help

    try:
        values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        got = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(
            "a readable YAML file of options", f"{path}: {got}", "write @FILE, for example @best.yaml"
        ) from None
    if not isinstance(values, dict):
        raise InputError("a YAML map of options", f"{path}: {type(values).__name__}", "write lines like model: gru4rec")
    return list(_flat(values))


def _flat(values: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """The `key=value` pairs of a map, nested names joined by dots."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={_text(value)}"


def _text(value: Any) -> str:
    """Format a value for a command line.

    >>> _text(True), _text(None), _text([5, 10]), _text("a=b"), _text(1e-05), _text(["a b", "c,d"])
    ('true', 'null', '[5,10]', 'a=b', '1e-05', '[a b,"c,d"]')
    """
    if isinstance(value, list):
        return f"[{','.join(map(_list_element, value))}]"
    words = {True: "true", False: "false", None: "null"}
    return words[value] if isinstance(value, bool) or value is None else str(value)


def _list_element(value: Any) -> str:
    """Format an element of a list, in quotes if it has characters that mean something in a list."""
    if not isinstance(value, str) or not SPECIAL.search(value):
        return _text(value)
    return '"' + re.sub(r'([\\"])', r"\\\1", value) + '"'
