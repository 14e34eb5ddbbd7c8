"""Malicious files in a run folder execute nothing and give a plain error."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct

import pytest

from tests.support.runs import assert_same_run, options
from trainer.__main__ import main
from trainer.run.checkpoint import STATE, TENSORS, latest
from trainer.show import main as show


class Planted:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def lying_header(size: int) -> bytes:
    header = json.dumps({"table.item.vector": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"x" * 16


@pytest.mark.parametrize("what", ["pickle", "a length beyond the file", "a header that is too long", "nothing"])
def test_invalid_checkpoint_is_reported_and_the_previous_one_is_used(fifty, undisturbed, tmp_path, what, capfd):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "bundle")
    newest = latest(run / "checkpoints")
    planted = {
        "pickle": pickle.dumps(Planted(str(tmp_path / "planted"))),
        "a length beyond the file": lying_header(1 << 42),
        "a header that is too long": struct.pack("<Q", 1 << 62) + b"{}",
        "nothing": b"",
    }[what]
    (newest / TENSORS).write_bytes(planted)
    state = json.loads((newest / STATE).read_text())
    state["sha256"] = hashlib.sha256(planted).hexdigest()
    (newest / STATE).write_text(json.dumps(state))
    assert main(options(fifty, run)) == 0
    assert f"checkpoint {newest.name} is broken" in capfd.readouterr().err
    assert not (tmp_path / "planted").exists()
    assert_same_run(undisturbed, run)


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.mkdir ['{}']", "train: !!python/name:os.system", "a: [", "just words", "train: 3"],
)
def test_invalid_config_executes_nothing_and_is_a_one_line_error(fifty, undisturbed, tmp_path, text, capfd):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "config.yaml").write_text(text.format(tmp_path / "planted"))
    for program, arguments in ((main, options(fifty, run)), (show, [f"run={run}"])):
        assert program(arguments) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: expected ")
        assert err.count("\n") == 1
    assert not (tmp_path / "planted").exists()
