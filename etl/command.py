"""How each program starts: options → one typed configuration → exit status.

Hydra composes the options (`key=value`, groups, defaults) against dataclasses; whatever a user can
get wrong ends as one `error: expected …, got … (cure)` line and exit status 2.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from etl.folder import InputError

Config = TypeVar("Config")


def option(default: Any, text: str) -> Any:
    """A configuration field with its help text (mutable defaults are copied for each instance)."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def group(schema: type[Config], text: str = "") -> Config:
    """A nested configuration."""
    return dataclasses.field(default_factory=schema, metadata={"help": text})


def read_options(schema: type[Config], module: str, options: Sequence[str]) -> Config:
    """Compose `conf/config.yaml` of `module` with `options` into an instance of `schema`.

    Args:
        schema: dataclass with the options' types and defaults.
        module: package that holds the YAML files, for instance `etl.conf`.
        options: the command line, `key=value` each.

    Raises:
        InputError: an unknown, missing, ill-typed or unreadable option.
    """
    # Not needed for --help, and an eighth of a second.
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    maps = [name for name, entry in _fields(schema) if str(entry.type).startswith("dict")]
    ConfigStore.instance().store(name="schema", node=schema)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(config_module=module, version_base="1.3"):
            composed = compose("config", overrides=[_opened(option, maps) for option in options])
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise InputError(f"option {missing[0]}=…", "nothing", f"add {missing[0]}=…; --help lists all options")
        return cast(Config, OmegaConf.to_object(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise _plain(error, schema) from None


def _opened(option: str, maps: list[str]) -> str:
    """An option with Hydra's `++` where it is one of `maps`, which take no new names without it, or a name in one."""
    name = option.partition("=")[0]
    return f"++{option}" if any(name == known or name.startswith(f"{known}.") for known in maps) else option


def _plain(error: Exception, schema: type[Any]) -> InputError:
    """One sentence for Hydra's and OmegaConf's many-line messages."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e)
    known = list(_fields(schema))
    names = [name for name, _ in known]
    type_error = re.search(r"Value '(.*?)' .*(?:could not be converted to|is not a valid) (\w+)", text)
    if found := re.search(r"Could not override '([^']+)'", text):
        name = found.group(1)
        if name in names or type_error:
            key = re.search(r"full_key: (\S+)", text)
            return _ill_typed(key.group(1) if key else name, type_error, text)
        return InputError("a known option", name, _suggest(name, names))
    if type_error:
        key = re.search(r"full_key: (\S+)", text)
        return _ill_typed(key.group(1) if key else "an option", type_error, text)
    if found := re.search(r"(?:In|Could not find) '?([\w/]+)'?.*?Available options in '\S+':\s*(.*)", text, re.S):
        choices = ", ".join(found.group(2).split())
        return InputError(f"one of {choices}", found.group(1), "choose one of these")
    if found := re.search(r"parsing override '(.*?)'", text):
        cure = "put quotes around special characters: key='\"value\"'"
        return InputError("options as key=value", found.group(1), cure)
    return InputError("valid options", text.strip().splitlines()[0], "--help lists all options")


def _ill_typed(key: str, found: re.Match[str] | None, text: str) -> InputError:
    if found is None:
        return InputError(f"a valid value of {key}", text.strip().splitlines()[-1], "--help lists types")
    words = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "bool": "true or false"}
    wanted = words.get(found.group(2), found.group(2))
    return InputError(f"{wanted} for {key}", repr(found.group(1)), f"write {key}=VALUE of that type")


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, 1) or [n for n in names if n.endswith(f".{name}")][:1]
    return f"did you mean {close[0]}? --help lists all" if close else "--help lists all options"


def _fields(schema: type[Any], prefix: str = "") -> list[tuple[str, dataclasses.Field[Any]]]:
    """Every option with its dotted name, nested ones in place."""
    found: list[tuple[str, dataclasses.Field[Any]]] = []
    for entry in dataclasses.fields(schema):
        nested = entry.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            found += _fields(nested, f"{prefix}{entry.name}.")
        else:
            found.append((prefix + entry.name, entry))
    return found


def usage(program: str, schema: type[Any]) -> str:
    """The help text: each option with its default and meaning."""
    lines = [f"usage: python -m {program} key=value …", ""]
    for name, entry in _fields(schema):
        factory = entry.default_factory
        default = factory() if factory is not dataclasses.MISSING else entry.default
        shown = {"???": "(required)", None: "null", True: "true", False: "false"}.get(
            default if isinstance(default, (str, bool, type(None))) else "", default
        )
        lines.append(f"  {name:<28} {shown!s:<16} {entry.metadata.get('help', '')}")
    return "\n".join(lines)


def run_program(
    program: str, schema: type[Config], job: Callable[[list[str]], None], argv: Sequence[str] | None = None
) -> int:
    """Run `job` on the command line's options and return the exit status.

    0 is success, 2 a plain error line for what the user can mend, 130 an interrupt; anything else
    is a bug and shows its traceback.
    """
    options = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(options):
        print(usage(program, schema))
        return 0
    try:
        job(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    return 0
