"""Programs meet in files: imports run etl ← retrieval ← trainer ← cluster, engines stay at the edge."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "etl": {"torch", "ray", "faiss", "retrieval", "trainer", "cluster"},
    "retrieval": {"torch", "ray", "pyspark", "trainer", "cluster"},
    "trainer": {"pyspark", "faiss", "cluster"},
    "cluster": set(),
}
LEAN = {"etl/contract.py", "etl/folder.py", "etl/remote.py", "retrieval/bundle.py"}
"""Contract modules: the standard library, numpy, pyarrow and each other."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_package_imports_against_the_direction(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & FORBIDDEN[package], path


def test_contracts_need_nothing_but_numpy_and_pyarrow():
    for name in LEAN:
        for module in imports(ROOT / name):
            root = module.split(".")[0]
            own = module.replace(".", "/") + ".py" in LEAN
            assert own or root in {"numpy", "pyarrow"} or root in sys.stdlib_module_names, (name, module)


def test_ray_is_known_to_one_file_of_the_trainer():
    knowing = [p.name for p in (ROOT / "trainer").rglob("*.py") if {m.split(".")[0] for m in imports(p)} & {"ray"}]
    assert knowing == ["worker.py"]
