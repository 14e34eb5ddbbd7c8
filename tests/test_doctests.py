"""The examples in docstrings of all modules."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("etl", "retrieval", "trainer", "cluster", "tests")


def modules_with_examples() -> list[str]:
    """Modules of all packages whose source has an example; the others need not be imported."""
    actual = []
    for package in PACKAGES:
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            path = ROOT.joinpath(*module.name.split("."))
            source = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
            if any(line.lstrip().startswith(">>> ") for line in source.read_text().splitlines()):
                actual.append(module.name)
    return actual


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples_pass(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


def test_modules_with_examples_are_found_in_every_package():
    names = modules_with_examples()
    assert {"cluster.config", "etl.protocol", "retrieval.metrics.ranking", "tests.benchmarks.expected"} <= set(names)
    folders = {path.parent.relative_to(ROOT) for p in PACKAGES for path in (ROOT / p).rglob("*.py")}
    assert {folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()} == set()
