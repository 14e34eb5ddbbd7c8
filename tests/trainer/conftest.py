"""Shared fixtures: an undisturbed run, and the devices that models are trained on."""

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
    """A GPU with TF32 disabled, so that the tolerances of float32 hold."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU and NEXTCLICK_GPU=1")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The CPU, and a GPU if there is one."""
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("gpu")
