"""Import rules: etl ← retrieval ← trainer ← cluster, and engines only in the modules that drive them."""

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
    "etl/dataset.py",
    *(f"etl/runtime/{name}.py" for name in ("dataset_folder", "errors", "files", "lookup", "locks", "output_path")),
    *(f"etl/runtime/{name}.py" for name in ("output_file", "output_folder", "object_store")),
    *("retrieval/bundle.py", "retrieval/bundle_checks.py", "retrieval/queries.py", "retrieval/ragged.py"),
}
"""Contract modules: the standard library, numpy, pyarrow and each other."""


def imports(path: Path) -> set[str]:
    actual = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            actual |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            actual.add(node.module)
    return actual


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_in_one_direction_only(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & FORBIDDEN[package], path


@pytest.mark.parametrize("package", ["retrieval", "trainer"])
def test_other_packages_import_only_dataset_and_runtime_of_etl(package):
    """Other packages use the dataset schema and the shared runtime, and nothing of the sessions job."""
    for path in (ROOT / package).rglob("*.py"):
        rooms = {tuple(name.split(".")[:2]) for name in imports(path) if name.split(".")[0] == "etl"}
        assert rooms <= {("etl", "dataset"), ("etl", "runtime")}, path


def test_contract_modules_import_only_numpy_and_pyarrow():
    for name in LEAN:
        for module in imports(ROOT / name):
            root = module.split(".")[0]
            own = module.replace(".", "/") + ".py" in LEAN
            assert own or root in {"numpy", "pyarrow"} or root in sys.stdlib_module_names, (name, module)


def test_only_two_trainer_modules_import_ray():
    knowing = [p.name for p in (ROOT / "trainer").rglob("*.py") if {m.split(".")[0] for m in imports(p)} & {"ray"}]
    assert sorted(knowing) == ["ray_train.py", "ray_tune.py"]


LIGHT = (
    "trainer.__main__",
    "trainer.show",
    "trainer.plan",
    "trainer.apply",
    "trainer.export",
    "trainer.serve",
    "trainer.tune",
    "retrieval.__main__",
    "retrieval.compare",
    "retrieval.average",
    "etl.__main__",
    "etl.movielens",
    "etl.kuairand",
    "etl.merlin",
    "etl.describe",
    "etl.twin.__main__",
    "etl.overlap",
    "cluster.__main__",
    "cluster.evaluate",
)
"""Programs that import none of `HEAVY` before their options are checked."""
HEAVY = {
    "aiohttp",
    "numpy",
    "pyarrow",
    "pandas",
    "scipy",
    "matplotlib",
    "pyspark",
    "py4j",
    "torch",
    "ray",
    "faiss",
    "tensorboard",
}
LINES = [
    *((name, line, status) for name in LIGHT for line, status in (("--help", 0), ("no_such_option=1", 2))),
    ("cluster.__main__", "action=status local.state=/nowhere", 2),
    ("cluster.__main__", "submit=train target=ray", 2),
    ("cluster.__main__", "pipeline=none", 2),
    ("trainer.__main__", "data=d output=o model=bert", 2),
    ("retrieval.__main__", "bundle=b data=d output=o index=magic", 2),
    ("etl.__main__", "input=a output=o scenario=tiktok", 2),
]
PROBE = """
import importlib, json, sys
for name, line, _ in json.loads(sys.argv[1]):
    status = importlib.import_module(name).main(line.split())
    print("PROBE", json.dumps([name, line, status, sorted({m.split(".")[0] for m in sys.modules})]))
"""


def test_help_and_option_errors_import_no_heavy_package():
    """One process runs all programs in turn, so an import by one of them shows in all later ones."""
    options = [sys.executable, "-c", PROBE, json.dumps(LINES)]
    done = subprocess.run(options, cwd=ROOT, capture_output=True, text=True, check=True)
    message = [
        json.loads(line.removeprefix("PROBE ")) for line in done.stdout.splitlines() if line.startswith("PROBE ")
    ]
    assert [tuple(record[:3]) for record in message] == LINES
    for name, line, _, modules in message:
        assert not HEAVY & set(modules), (name, line)


def test_light_lists_every_program():
    """A file that ends with a call of its `main` is a program; `cluster.etl_job` is one that Spark has started."""
    files = [p for package in FORBIDDEN for p in (ROOT / package).rglob("*.py") if "sys.exit(main())" in p.read_text()]
    assert {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files} - {"cluster.etl_job"} == set(LIGHT)
