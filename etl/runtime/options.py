"""Command lines: `key=value` options → one typed configuration → exit status.

Hydra composes the options (`key=value`, groups, defaults) against dataclasses; user
errors end as one `error: expected …, got … (hint)` line and exit status 2.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from etl.runtime.errors import InputError
from etl.runtime.locks import UNLOCKED
from etl.runtime.option_checks import Bounds, check_values, described
from etl.runtime.option_files import expand_files

Config = TypeVar("Config")
TRACEBACK, TRACEBACK_VARIABLE = "--traceback", "NEXTCLICK_TRACEBACK"
"""Option and environment variable to show tracebacks of user errors."""
SYSTEM_ERRORS = ("files and network that work", "room on the disk")
"""What was expected where the system failed and not the user: the same command may succeed later."""
TRANSIENT_ERRORS = (*SYSTEM_ERRORS, UNLOCKED)
"""The same, and that another process writes to the output."""


def option(default: Any, text: str, *, choices: Sequence[Any] = (), **bounds: float) -> Any:
    """A configuration field (mutable defaults are copied per instance).

    Args:
        default: default value.
        text: help text.
        choices: allowed values.
        bounds: `at_least`, `above`, `at_most`, `below`.
    """
    metadata = {"help": text, "choices": tuple(choices), "bounds": Bounds(**bounds) if bounds else None}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(schema: type[Config], text: str = "") -> Config:
    """A nested configuration."""
    return dataclasses.field(default_factory=schema, metadata={"help": text})


def read_options(
    schema: type[Config], module: str | None, options: Sequence[str], presets: Sequence[str] = ()
) -> Config:
    """Read `options` into an instance of `schema`, and check them against its bounds and choices.

    Texts and lists of texts are taken literally, whatever characters a path has, without enclosing quotes. Hydra
    parses all other values.

    Args:
        schema: dataclass with the options' types and defaults.
        module: package with `config.yaml` and presets, for instance `etl.conf`; None = the defaults of `schema` only.
        options: the command line, `key=value` each.
        presets: overrides added by the program, in Hydra's grammar; options win over them.

    Raises:
        InputError: an option is unknown, missing, ill-typed, unreadable or out of its range.
    """
    # slow import (1/8 s), not needed for --help
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides, texts = list(presets), dict[str, Any]()
    for arguments in options:
        name, value, kind = _known_option(arguments, schema)
        if kind in TEXTS:
            texts[name] = read_text(value, kind)
        else:
            # New keys of maps need `++`.
            overrides.append(f"{'++' if kind == 'map' else ''}{name}={_plain_value(name, value, kind)}")
    try:
        composed = copy.deepcopy(_compose(cast(Any, schema), module, tuple(overrides)))
        for name, value in texts.items():
            OmegaConf.update(composed, name, value, merge=False)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise InputError(f"option {missing[0]}=…", "nothing", f"add {missing[0]}=…; --help lists all options")
        config = cast(Config, OmegaConf.to_object(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise _plain(error, schema) from None
    for name, _ in _fields(schema):
        number = functools.reduce(getattr, name.split("."), config)
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise InputError(f"{name} below 2^63", number, "the maximum is 2^63 - 1")
    check_values(config)
    return config


@functools.lru_cache(maxsize=64)
def _compose(schema: type[Any], module: str | None, overrides: tuple[str, ...]) -> Any:
    """What Hydra composes of defaults, presets and overrides: 0.1 s, so the same ones are composed once."""
    from hydra import compose, initialize, initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    ConfigStore.instance().store(name="schema", node=schema)
    GlobalHydra.instance().clear()
    if module is None:
        with initialize(config_path=None, version_base="1.3"):
            return compose("schema", overrides=list(overrides))
    with initialize_config_module(config_module=module, version_base="1.3"):
        return compose("config", overrides=list(overrides))


TEXTS = ("str", "str | None", "Any", "list[str]")
"""Types whose values are parsed here; a value of type `Any` may also be a number, true, false or null."""
_SCALAR = re.compile(r"[+-]?\d+|[+-]?(\d+\.\d*|\.?\d+)([eE][+-]?\d+)?|true|false|null")


def _known_option(option: str, schema: type[Any]) -> tuple[str, str, str]:
    """Name, value and type of an option; the type is `group` for a group of options, `map` for an entry of a map.

    Raises:
        InputError: an unknown option, or not `key=value`.
    """
    name, equals, value = option.partition("=")
    fields = _fields(schema)
    kinds = {known: str(entry.type) for known, entry in fields}
    groups = {known.rpartition(".")[0] for known in kinds} - {""}
    maps = [known for known, kind in kinds.items() if kind.startswith("dict")]
    if not equals:
        hint = f"write {name}=VALUE" if name in kinds else _suggest(name.lstrip("+~"), list(kinds))
        raise InputError("options as key=value", option, hint)
    if any(name == known or name.startswith(f"{known}.") for known in maps):
        return name, value, "map"
    if name in groups:
        return name, value, "group"
    if name not in kinds:
        raise InputError("a known option", name, _suggest(name.lstrip("+~"), list(kinds)))
    return name, value, kinds[name]


def read_text(value: str, kind: str) -> Any:
    """Parse the value of a text option.

    >>> read_text("a=b, c.csv", "str"), read_text("[a b.csv,'c,d']", "Any"), read_text("3", "Any")
    ('a=b, c.csv', ['a b.csv', 'c,d'], 3)
    """
    stripped = value.strip()
    if kind != "str" and stripped == "null":
        return None
    if kind in ("Any", "list[str]") and stripped.startswith("[") and stripped.endswith("]"):
        # Commas separate elements, except within quotes.
        elements = re.findall(r"""\s*("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,]*)\s*(?:,|$)""", stripped[1:-1])
        elements = elements[: stripped.count(",") + 1] if stripped[1:-1].strip() else []
        if elements and not elements[-1]:
            elements.pop()
        return [_element(part, kind) for part in elements]
    return [_element(value, kind)] if kind == "list[str]" else _element(value, kind)


def _element(text: str, kind: str) -> Any:
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        return re.sub(r"\\([\\'\"])", r"\1", text[1:-1]).replace("${", "\\${")
    if kind == "Any" and _SCALAR.fullmatch(text.strip()):
        words = {"true": True, "false": False, "null": None}
        number = text.strip()
        return words[number] if number in words else int(number) if number.lstrip("+-").isdigit() else float(number)
    text = text.strip() if kind != "str" and kind != "str | None" else text
    expanded = os.path.expanduser(text) if text == "~" or text.startswith("~/") else text
    return expanded.replace("${", "\\${")  # escape OmegaConf's interpolation


def _plain_value(name: str, value: str, kind: str) -> str:
    """Validate a value for Hydra.

    Raises:
        InputError: characters that no value of the type has, which Hydra's grammar may interpret.
    """
    allowed = {"group": r"[\w-]+", "map": r"[\w\s.:,{}+-]+"}.get(kind, r"[\w\s.,+\[\]-]*")
    if not re.fullmatch(allowed, value) or (kind.startswith(("int", "float", "bool")) and re.search(r"[,\[\]]", value)):
        expected = {"group": "the name of a preset", "map": "{name:number,…}"}.get(kind) or _expected(kind)
        raise InputError(f"{expected} for {name}", repr(value), f"write {name}=VALUE of that type")
    return value


def _expected(kind: str) -> str:
    base = kind.removesuffix(" | None")
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "list[int]": "a list like [1,2]"}
    return words.get(base, base)


def _plain(error: Exception, schema: type[Any]) -> InputError:
    """Condense multi-line messages of Hydra and OmegaConf to one sentence."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e)
    known = list(_fields(schema))
    names = [name for name, _ in known]
    type_error = re.search(r"Value '(.*?)' .*(?:could not be converted to|is not a valid) (\w+)", text)
    if result := re.search(r"Could not override '([^']+)'", text):
        name = result.group(1)
        if name in names or type_error:
            key = re.search(r"full_key: (\S+)", text)
            return _ill_typed(key.group(1) if key else name, type_error, text)
        return InputError("a known option", name, _suggest(name, names))
    if type_error:
        key = re.search(r"full_key: (\S+)", text)
        return _ill_typed(key.group(1) if key else "an option", type_error, text)
    if result := re.search(
        r"Could not find '(\w+)/([\w-]+)'.*?Available options in '\S+':\n((?:\t\S+\n?)+)", text, re.S
    ):
        group, name, choices = result.groups()
        return InputError(f"{group} one of {', '.join(choices.split())}", name, "choose one of these")
    if result := re.search(r"Error merging override \+*([\w.]+)=(.*)", text):
        name, value = result.groups()
        expected = _expected(str(dict(known)[name].type)) if name in names else "a valid value"
        return InputError(f"{expected} for {name}", repr(value), f"write {name}=VALUE of that type")
    if result := re.search(r"parsing override '(.*?)'", text):
        hint = "put quotes around special characters: key='\"value\"'"
        return InputError("options as key=value", result.group(1), hint)
    return InputError("valid options", text.strip().splitlines()[0], "--help lists all options")


def _ill_typed(key: str, match: re.Match[str] | None, text: str) -> InputError:
    if match is None:
        return InputError(f"a valid value of {key}", text.strip().splitlines()[-1], "--help lists types")
    words = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false", "bool": "true or false"}
    expected = words.get(match.group(2), match.group(2))
    return InputError(f"{expected} for {key}", repr(match.group(1)), f"write {key}=VALUE of that type")


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, 1) or [n for n in names if n.endswith(f".{name}")][:1]
    return f"did you mean {close[0]}? --help lists all" if close else "--help lists all options"


def _fields(schema: type[Any], prefix: str = "") -> list[tuple[str, dataclasses.Field[Any]]]:
    """Every option with its dotted name, nested options in order."""
    result: list[tuple[str, dataclasses.Field[Any]]] = []
    for entry in dataclasses.fields(schema):
        nested = entry.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            result += _fields(nested, f"{prefix}{entry.name}.")
        else:
            result.append((prefix + entry.name, entry))
    return result


def usage(program: str, schema: type[Any]) -> str:
    """The help text: each option with its default and meaning."""
    lines = [f"usage: python -m {program} [@FILE.yaml] key=value … [{TRACEBACK}]", ""]
    for name, entry in _fields(schema):
        factory = entry.default_factory
        default = factory() if factory is not dataclasses.MISSING else entry.default
        shown = {"???": "(required)", None: "null", True: "true", False: "false"}.get(
            default if isinstance(default, (str, bool, type(None))) else "", default
        )
        lines.append(f"  {name:<28} {shown!s:<16} {described(entry)}")
    return "\n".join(lines)


OPENMP_SPIN_ENV = ("GOMP_SPINCOUNT", "10000")
"""Spin count of OpenMP threads (torch, FAISS) before they sleep, read when the library is loaded.

By default they spin for milliseconds, which on busy machines takes cores from the threads they wait for: two threads on
two busy cores trained at a fifth of the rate of one.
"""


def run_program(
    program: str, schema: type[Config], job: Callable[[list[str]], None], argv: Sequence[str] | None = None
) -> int:
    """Run `job` on the command line's options and return the exit status.

    0 = success, 2 = a user error printed as one line, 130 = interrupted, 141 = closed output; anything else is a
    bug and shows its traceback.
    """
    options = list(sys.argv[1:] if argv is None else argv)
    traceback = TRACEBACK in options or bool(os.environ.get(TRACEBACK_VARIABLE))
    options = [option for option in options if option != TRACEBACK]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # do not fail on terminals without Unicode
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if {"-h", "--help"} & set(options):
        print(usage(program, schema))
        return 0
    os.environ.setdefault(*OPENMP_SPIN_ENV)
    try:
        job(expand_files(options))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # the reader of our output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError) as error:
        if traceback:
            raise
        message = error if isinstance(error, InputError) else file_error(error)
        print(f"error: {message}", file=sys.stderr, flush=True)
        return 2
    return 0


def file_error(error: OSError) -> InputError:
    """A system error on a file or the network, as one line."""
    hint = f"{TRACEBACK} shows where"
    if error.errno == errno.ENOSPC:
        return InputError(SYSTEM_ERRORS[1], str(error), f"free disk space; {hint}")
    got = " ".join(str(error).split()) or type(error).__name__
    return InputError(SYSTEM_ERRORS[0], got, f"check that; {hint}")
