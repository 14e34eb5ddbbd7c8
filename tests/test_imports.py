"""Programs meet in files: imports run etl ← retrieval ← trainer ← cluster, engines stay at the edge."""

from __future__ import annotations

import ast
import json
import subprocess
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
LEAN = {
    *("etl/contract.py", "etl/dataset_folder.py", "etl/folder.py", "etl/remote.py"),
    *("retrieval/bundle.py", "retrieval/bundle_checks.py"),
}
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


NOTHING: set[str] = set()
ARRAYS = {"numpy", "pyarrow"}
MAY_IMPORT = {
    "trainer.__main__": NOTHING,
    "trainer.show": NOTHING,
    "trainer.plan": NOTHING,
    "trainer.apply": NOTHING,
    "retrieval.__main__": NOTHING,
    "retrieval.compare": NOTHING,
    "etl.__main__": NOTHING,
    "etl.movielens": NOTHING,
    "etl.kuairand": NOTHING,
    "etl.describe": NOTHING,
    "etl.twin.__main__": NOTHING,
    "etl.overlap": NOTHING,
}
"""Programs, and what each may import of `HEAVY` before its options are checked; those that may less stand first."""
HEAVY = {*ARRAYS, "pandas", "scipy", "matplotlib", "pyspark", "py4j", "torch", "ray", "faiss", "psutil", "tensorboard"}
PROBE = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    for option in ("--help", "no_such_option=1"):
        status = importlib.import_module(name).main([option])
        print("PROBE", json.dumps([name, option, status, sorted({m.split(".")[0] for m in sys.modules})]))
"""


def test_help_and_a_wrong_option_need_no_engine():
    """One process runs all programs, one after the other, so what one of them imports the later ones have too."""
    given = [sys.executable, "-c", PROBE, json.dumps(list(MAY_IMPORT))]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=True)
    told = [json.loads(line.removeprefix("PROBE ")) for line in done.stdout.splitlines() if line.startswith("PROBE ")]
    assert [(name, status) for name, _, status, _ in told] == [(n, s) for n in MAY_IMPORT for s in (0, 2)]
    for name, option, _, modules in told:
        assert not HEAVY & set(modules) - MAY_IMPORT[name], (name, option)
