"""The mean of two models' normalised scores, against scores normalised one query at a time."""

from __future__ import annotations

import shutil
from statistics import fmean, pstdev

import numpy as np
import pytest

from retrieval.__main__ import main as evaluate
from retrieval.average import main
from retrieval.bundle import finish_bundle, open_bundle
from retrieval.evaluate import read_run_file
from retrieval.mean_bundle import queries_by_user, scaled_queries, vectors_of
from tests.data import TINY
from tests.support.bundles import other_model


def slow_scores(bundle, split):
    """Normalised scores by user: `[user][item]`."""
    items = bundle.item_vectors().astype(float).tolist()
    table = queries_by_user(bundle, split)
    out = {}
    for user, query in zip(table["user_id"].to_pylist(), table["vector"].to_pylist(), strict=True):
        score = [sum(a * b for a, b in zip(query, item, strict=True)) for item in items]
        mean, deviation = fmean(score), pstdev(score)
        out[user] = [(s - mean) / deviation for s in score]
    return out


def test_mean_bundle_scores_are_the_mean_of_normalised_scores(tmp_path):
    second, output = other_model(tmp_path / "second"), tmp_path / "mean"
    assert main([f"bundles=[{TINY / 'bundle'},{second}]", f"output={output}"]) == 0
    mean = open_bundle(output)
    for split in ("valid", "test", "next"):
        sides = [slow_scores(open_bundle(path), split) for path in (TINY / "bundle", second)]
        table = queries_by_user(mean, split)
        actual = vectors_of(table) @ mean.item_vectors().T
        expected = [np.mean([side[user] for side in sides], axis=0) for user in table["user_id"].to_pylist()]
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    options = [
        f"bundle={output}",
        f"data={TINY / 'data'}",
        f"output={tmp_path / 'result'}",
        "blend=none",
        "cutoffs=[1,2,5]",
    ]
    assert evaluate(options) == 0


def test_query_with_equal_scores_for_all_items_contributes_zero():
    covariance = np.diag([4.0, 0.0])
    actual = scaled_queries(np.array([[3, 7], [0, 5]], np.float32), covariance)
    np.testing.assert_allclose(actual, [[0.5, 7 / 6], [0, 0]])


def test_bundles_that_cannot_be_averaged_are_refused(tmp_path, capsys):
    fewer = other_model(tmp_path / "fewer", drop_user=True)
    own, output = TINY / "bundle", tmp_path / "mean"
    for options, said in (
        ([f"bundles=[{own}]", f"output={output}"], "two bundles or more"),
        ([f"bundles=[{own},{own}]", f"output={tmp_path}"], "an output that does not exist"),
        ([f"bundles=[{own},{own}]", "output=s3://b/c"], "a path for output"),
        ([f"bundles=[{own},{fewer}]", f"output={output}"], "with the same valid queries"),
    ):
        assert main(options) == 2
        assert said in capsys.readouterr().err
    assert not output.exists()


def test_bundles_of_two_datasets_are_refused(tmp_path, capsys):
    second = other_model(tmp_path / "second")
    finish_bundle(second, dataset="another", refit=False, n_items=12, dimension=5, model="other")
    assert main([f"bundles=[{TINY / 'bundle'},{second}]", f"output={tmp_path / 'mean'}"]) == 2
    assert "bundles of one dataset" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_scale_of_a_models_scores_does_not_matter(scale):
    query, covariance = np.array([[1.0, -2.0]], np.float32), np.array([[2.0, 0.3], [0.3, 1.0]])
    expected = scaled_queries(query, covariance)
    np.testing.assert_allclose(scaled_queries((scale * query).astype(np.float32), covariance), expected, rtol=1e-5)


def test_mean_of_refit_models_has_the_mean_of_their_bundles_before_the_refit(tmp_path, capsys):
    runs = [tmp_path / name for name in ("first", "second")]
    for run, source in zip(runs, (TINY / "bundle", other_model(tmp_path / "other")), strict=True):
        shutil.copytree(source, run / "bundle-selected")
        shutil.copytree(source, run / "bundle")
        shutil.rmtree(run / "bundle" / "transitions", ignore_errors=True)
        for folder in (run / "bundle").glob("*-valid"):
            shutil.rmtree(folder)
        manifest = open_bundle(source).manifest
        names = {"dataset": manifest.dataset, "n_items": manifest.n_items, "dimension": manifest.dimension}
        finish_bundle(run / "bundle", refit=True, model=run.name, **names)
    bundles = f"bundles=[{runs[0] / 'bundle'},{runs[1] / 'bundle'}]"
    assert main([bundles, f"output={runs[0] / 'mean'}"]) == 2
    assert "an output without bundle-selected beside it" in capsys.readouterr().err
    assert main([bundles, f"output={tmp_path / 'mean' / 'bundle'}"]) == 0
    selected = tmp_path / "selected"
    assert main([f"bundles=[{TINY / 'bundle'},{tmp_path / 'other'}]", f"output={selected}"]) == 0
    actual, expected = (open_bundle(path) for path in (tmp_path / "mean" / "bundle-selected", selected))
    assert [f.sha256 for f in actual.manifest.files] == [f.sha256 for f in expected.manifest.files]
    options = [f"bundle={tmp_path / 'mean' / 'bundle'}", f"data={TINY / 'data'}", f"output={tmp_path / 'result'}"]
    assert evaluate([*options, "cutoffs=[1,2,5]"]) == 0


def test_report_of_an_average_beside_a_run_does_not_show_the_runs_cost(tmp_path):
    shutil.copytree(TINY / "bundle", tmp_path / "bundle")
    (tmp_path / "summary.json").write_text('{"seed": 7}')
    assert read_run_file(open_bundle(tmp_path / "bundle"), "summary.json") == {"seed": 7}
    assert main([f"bundles=[{tmp_path / 'bundle'},{tmp_path / 'bundle'}]", f"output={tmp_path / 'mean'}"]) == 0
    assert read_run_file(open_bundle(tmp_path / "mean"), "summary.json") == {}
