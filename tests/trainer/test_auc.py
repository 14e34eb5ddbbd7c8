"""AUCs of the last validation equal those that the evaluation computes from the bundle."""

from __future__ import annotations

import json

import pytest

from retrieval.__main__ import main as evaluate
from tests.support.runs import SMALL
from trainer.__main__ import main as train


@pytest.mark.parametrize("model", ["hybrid", "rank_mmoe", "rank_esmm"])
def test_validation_aucs_equal_those_of_the_bundle(fifty, tmp_path, model):
    run, result = tmp_path / "run", tmp_path / "result"
    assert train([f"data={fifty.path}", f"output={run}", *SMALL, f"model={model}", "train.valid_sessions=1000"]) == 0
    options = [f"bundle={run / 'bundle'}", f"data={fifty.path}", f"output={result}", "blend=none"]
    assert evaluate(options) == 0
    trained = json.loads((run / "summary.json").read_text())["valid"]
    actual = json.loads((result / "metrics.json").read_text())["valid"]
    names = [name for name in trained if name.startswith("auc/")]
    assert {"auc/click", "auc/like"} <= set(names)
    assert trained["auc/click"] is not None
    for name in names:
        assert actual[name] == (trained[name] and pytest.approx(trained[name], abs=1e-6)), name  # null with one class
