"""What several files of tests read: a run that nothing disturbed, and the devices that models are trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.runs import options
from trainer.__main__ import main


@pytest.fixture(scope="module")
def undisturbed(fifty, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(options(fifty, run)) == 0
    return run


@pytest.fixture
def gpu(monkeypatch) -> torch.device:
    """A GPU that computes in float32 as it says, for the tolerances of float32."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU and NEXTCLICK_GPU=1")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The CPU, and a GPU where there is one."""
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("gpu")
