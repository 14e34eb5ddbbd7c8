"""The packages of retrieval import each other in one direction."""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path

from tests.test_imports import ROOT, imports


def layer(module: str) -> str:
    """The package of a module, or the module itself if it lies in none."""
    return module.split(".")[1] if "." in module else ""


def test_packages_and_modules_import_without_cycles():
    graph: dict[str, set[str]] = {}
    for path in (ROOT / "retrieval").rglob("*.py"):
        own = layer(".".join(Path(path).relative_to(ROOT).with_suffix("").parts))
        used = {layer(module) for module in imports(path) if module.startswith("retrieval.")}
        graph.setdefault(own, set()).update(used - {own})
    order = list(TopologicalSorter(graph).static_order())
    layers = ["sources", "transitions", "search", "rankers", "blend"]
    assert [name for name in order if name in layers] == layers
