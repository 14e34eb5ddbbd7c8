"""What several files of tests read: a run that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import options
from trainer.__main__ import main


@pytest.fixture(scope="module")
def undisturbed(fifty, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(options(fifty, run)) == 0
    return run
