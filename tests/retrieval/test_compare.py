"""Several results on one page."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.__main__ import main as evaluate
from retrieval.compare import main
from retrieval.config import BASELINES
from retrieval.ranking import read_ranks
from retrieval.significance import compare, gains, holm


@pytest.fixture
def results(tiny):
    """Two results of the tiny bundle, the second one's vectors turned round."""
    bundle = tiny / "bundle"
    for name in ("a", "b"):
        cutoffs = "cutoffs=[1,2,5]"
        assert evaluate([f"bundle={bundle}", f"data={tiny / 'data'}", f"output={tiny / name}", cutoffs]) == 0
    path = tiny / "b" / "ranks.parquet"
    table = pq.read_table(path)
    turned = pa.array(table["rank"].to_numpy()[::-1].copy())
    pq.write_table(table.set_column(table.schema.get_field_index("rank"), "rank", turned), path)
    return tiny


def command(folder, *more: str) -> list[str]:
    return [
        f"results=[{folder / 'a'},{folder / 'b'}]",
        f"output={folder / 'page.html'}",
        "metrics=[hr@2,ndcg@5]",
        *more,
    ]


def test_every_ranker_is_compared_with_the_first_model(results, capfd):
    assert main(command(results)) == 0
    rows = json.loads((results / "page.json").read_text())
    assert [row["ranker"] for row in rows[:4:2]] == ["tiny", f"tiny ({results / 'b'})"]
    assert {row["ranker"] for row in rows[4:]} == set(BASELINES)
    a, b = (read_ranks(results / name / "ranks.parquet") for name in "ab")
    ranks = {"tiny": a["model"], rows[2]["ranker"]: b["model"]} | {n: t for n, t in a.items() if n != "model"}
    base = a["model"]["rank"].to_numpy()
    others = [row for row in rows if row["ranker"] != "tiny"]
    found = [compare(ranks[r["ranker"]]["rank"].to_numpy(), base, r["metric"]) for r in others]
    for row, wanted, p in zip(others, found, holm([each.p for each in found]), strict=True):
        value = gains(ranks[row["ranker"]]["rank"].to_numpy(), row["metric"]).mean()
        assert row["value"] == pytest.approx(value)
        assert row["difference"] == pytest.approx(value - gains(base, row["metric"]).mean())
        assert row["p"] == pytest.approx(p)
        assert (row["difference_low"], row["difference_high"]) == (wanted.low, wanted.high)
    assert all(row["p"] is None for row in rows[:2])
    text = (results / "page.html").read_text()
    assert f"{rows[0]['value']:.4f}" in text
    assert "http" not in text
    assert "p (Holm)" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda told, table: (told | {"mask_seen": True}, table), "expected mask_seen=False, got True"),
        (lambda told, table: (told | {"dataset": "other"}, table), "expected dataset="),
        (lambda told, table: (told, table.slice(1)), "expected results over the same queries"),
        (lambda told, table: (told, table.filter(pa.array(np.zeros(len(table), bool)))), "with ranked test queries"),
        (lambda told, table: (told | {"test": {}}, table), "expected metrics of"),
    ],
)
def test_results_that_do_not_fit_are_refused(results, spoil, words, capfd):
    metrics, ranks = results / "b" / "metrics.json", results / "b" / "ranks.parquet"
    table = pq.read_table(ranks)
    table = pa.concat_tables([table.filter(pa.compute.equal(table["split"], s)) for s in ("test", "valid")])
    told, table = spoil(json.loads(metrics.read_text()), table)
    metrics.write_text(json.dumps(told))
    pq.write_table(table, ranks)
    assert main(command(results)) == 2
    err = capfd.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (results / "page.html").exists()


def test_what_is_no_result_is_refused(results, capfd):
    shutil.rmtree(results / "b")
    assert main(command(results)) == 2
    assert "error: expected result folders of python -m retrieval" in capfd.readouterr().err
    assert main([f"results=[{results / 'a'}]", f"output={results / 'page.txt'}"]) == 2
