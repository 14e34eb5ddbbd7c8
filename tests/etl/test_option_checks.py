"""Bounds and choices of options, and how they are described."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from etl.runtime.errors import InputError
from etl.runtime.option_checks import Bounds, check_values, described
from etl.runtime.options import group, option


@dataclass
class Inner:
    """A group."""

    share: float = option(0.5, "a share", at_least=0, below=1)
    size: int | None = option(None, "a size", at_least=1, at_most=9)


@dataclass
class Outer:
    """Options."""

    kind: str = option("a", "a kind", choices=("a", "b"))
    mask: object = option("auto", "a mask", choices=("auto", True, False))
    rate: float = option(0.1, "a rate", above=0)
    inner: Inner = group(Inner)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "c", "expected kind one of a, b, got c (for example kind=a)"),
        ("mask", None, "expected mask one of auto, True, False"),
        ("rate", 0.0, "expected rate of above 0, got 0.0"),
        ("rate", float("nan"), "expected rate of above 0, got nan"),
        ("rate", float("inf"), "expected rate of above 0, got inf"),
        ("inner.share", 1.0, "expected inner.share of at least 0 and below 1, got 1.0"),
        ("inner.share", -0.1, "expected inner.share of at least 0 and below 1, got -0.1 (0 is the minimum)"),
        ("inner.size", 0, "expected inner.size of at least 1 and at most 9, got 0 (1 is the minimum)"),
        ("inner.size", 10, "expected inner.size of at least 1 and at most 9, got 10 (9 is the maximum)"),
    ],
)
def test_value_out_of_bounds_is_reported_with_its_bounds(field, value, message):
    config = Outer()
    *groups, name = field.split(".")
    setattr(config.inner if groups else config, name, value)
    with pytest.raises(InputError) as error:
        check_values(config)
    assert message in str(error.value)


@pytest.mark.parametrize("inner", [Inner(), Inner(share=0.0, size=1), Inner(share=0.99, size=9)])
def test_values_at_their_bounds_and_a_null_default_are_valid(inner):
    check_values(Outer(kind="b", mask=False, inner=inner))


def test_help_shows_bounds_and_choices():
    fields = {field.name: field for field in (*dataclasses.fields(Outer), *dataclasses.fields(Inner))}
    assert described(fields["kind"]) == "a kind (a, b)"
    assert described(fields["size"]) == "a size (at least 1 and at most 9)"
    assert str(Bounds()) == ""
