"""`python -m tests.count`: count the assertions in the tests, to show that a change loses none.

An assertion is an `assert` or a `pytest.raises`. Parametrised cases are counted by
`python -m pytest --collect-only -q`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent


def assertions(source: str) -> int:
    """Number of `assert` statements and `raises` blocks.

    >>> assertions("with pytest.raises(ValueError):\\n    f()\\nassert a and b\\nassert c")
    3
    """
    return sum(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "raises")
        for node in ast.walk(ast.parse(source))
    )


def by_folder() -> Iterator[tuple[str, int]]:
    """Assertions of each folder of tests."""
    for folder in sorted({path.parent for path in HERE.rglob("*.py")}):
        actual = sum(assertions(path.read_text()) for path in folder.glob("*.py"))
        if actual:
            yield str(folder.relative_to(HERE.parent)), actual


if __name__ == "__main__":
    counts = dict(by_folder())
    for name, count in {**counts, "all": sum(counts.values())}.items():
        print(f"{count:6,}  {name}")
