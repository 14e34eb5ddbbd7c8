"""Several results on one page."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.__main__ import main as evaluate
from retrieval.compare import main
from retrieval.config import BASELINES
from retrieval.metrics.significance import compare, gains, holm
from retrieval.ranks_file import read_ranks
from retrieval.report.comparison import Row, sentence
from tests.data import TINY
from tests.support.browser import WIDTHS, opened


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A result of the tiny bundle, in a folder next to its dataset."""
    tiny = tmp_path_factory.mktemp("evaluated") / "tiny"
    shutil.copytree(TINY, tiny)
    options = [f"bundle={tiny / 'bundle'}", f"data={tiny / 'data'}", f"output={tiny / 'a'}", "cutoffs=[1,2,5]"]
    assert evaluate(options) == 0
    return tiny


@pytest.fixture
def results(evaluated, tmp_path):
    """The result twice, with the ranks of the second in reverse order."""
    tiny = tmp_path / "tiny"
    shutil.copytree(evaluated, tiny)
    shutil.copytree(tiny / "a", tiny / "b")
    path = tiny / "b" / "ranks.parquet"
    table = pq.read_table(path)
    write_ranks(path, table, table["ranker"].to_numpy() == "model")
    return tiny


def write_ranks(path, table, where):
    """Write the table with the ranks of some rows in reverse order."""
    rank = table["rank"].to_numpy().copy()
    rank[where] = rank[where][::-1]
    pq.write_table(table.set_column(table.schema.get_field_index("rank"), "rank", pa.array(rank)), path)


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
    assert {row["ranker"] for row in rows[4:]} == {"blend", *BASELINES}
    a, b = (read_ranks(results / name / "ranks.parquet") for name in "ab")
    ranks = {"tiny": a["model"], rows[2]["ranker"]: b["model"]} | {n: t for n, t in a.items() if n != "model"}
    base = a["model"]["rank"].to_numpy()
    others = [row for row in rows if row["ranker"] != "tiny"]
    actual = [compare(ranks[r["ranker"]]["rank"].to_numpy(), base, r["metric"]) for r in others]
    for row, expected, p in zip(others, actual, holm([each.p for each in actual]), strict=True):
        value = gains(ranks[row["ranker"]]["rank"].to_numpy(), row["metric"]).mean()
        assert row["value"] == pytest.approx(value)
        assert row["difference"] == pytest.approx(value - gains(base, row["metric"]).mean())
        assert row["p"] == pytest.approx(p)
        assert (row["difference_low"], row["difference_high"]) == (expected.low, expected.high)
    assert all(row["p"] is None for row in rows[:2])
    text = (results / "page.html").read_text()
    assert f"{rows[0]['value']:.4f}" in text
    assert f"NDCG@5 {rows[1]['value']:.4f}, what the others are compared with" in text
    assert text.count("no difference to tiny beyond chance") == sum(
        row["p"] is not None and row["p"] >= 0.05 for row in rows
    )
    assert "p (Holm)" in capfd.readouterr().out


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_page_opens_without_errors_or_requests_and_fits_the_width(results, width):
    assert main(command(results)) == 0
    actual = opened(results / "page.html", width)
    assert (actual.errors, actual.requests, actual.violations) == ([], [], [])
    assert actual.width <= width
    assert len(actual.charts) == 2


def test_sentences_say_who_is_better():
    row = Row("b", "hr@10", 0.3, 0.2, 0.4, 0.1, 0.05, 0.15, 0.01)
    assert sentence(row, "a") == "b: HR@10 0.3000, better than a by 0.1000."
    assert sentence(replace(row, difference=-0.1), "a") == "b: HR@10 0.3000, worse than a by 0.1000."
    assert sentence(replace(row, p=0.05), "a") == "b: HR@10 0.3000, no difference to a beyond chance."


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda message, table: (message | {"mask_seen": True}, table), "expected mask_seen=False, got True"),
        (lambda message, table: (message | {"dataset": "other"}, table), "expected dataset="),
        (lambda message, table: (message, table.slice(1)), "expected results over the same queries"),
        (
            lambda message, table: (message, table.filter(pa.array(np.zeros(len(table), bool)))),
            "with ranked test queries",
        ),
        (lambda message, table: (message | {"test": {}}, table), "expected metrics of"),
        (lambda message, table: (message | {"test": None}, table), "expected result folders of python -m retrieval"),
        (lambda message, table: ({"test": {}}, table), "(no model in metrics.json)"),
        (
            lambda message, table: (message, table.drop_columns(["rank"])),
            "expected result folders of python -m retrieval",
        ),
        (
            lambda message, table: (message, table.set_column(4, "rank", pa.array(np.zeros(len(table), np.int32)))),
            "(a rank below 1 in ranks.parquet)",
        ),
    ],
)
def test_results_that_are_not_comparable_are_refused(results, spoil, words, capfd):
    metrics, ranks = results / "b" / "metrics.json", results / "b" / "ranks.parquet"
    table = pq.read_table(ranks)
    table = pa.concat_tables([table.filter(pa.compute.equal(table["split"], s)) for s in ("test", "valid")])
    message, table = spoil(json.loads(metrics.read_text()), table)
    metrics.write_text(json.dumps(message))
    pq.write_table(table, ranks)
    assert main(command(results)) == 2
    err = capfd.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (results / "page.html").exists()


def test_equal_model_names_are_distinguished_and_equal_baselines_shown_once(results, capfd):
    """Three results of the model tiny; the last one is named twice and has other ranks of popularity."""
    table = pq.read_table(results / "b" / "ranks.parquet")
    write_ranks(results / "b" / "ranks.parquet", table, table["ranker"].to_numpy() == "popularity")
    third = f"results=[{results / 'a'},{results / 'b'},{results / 'b'}]"
    assert main([third, f"output={results / 'page.html'}", "metrics=[hr@2]"]) == 0
    names = [row["ranker"] for row in json.loads((results / "page.json").read_text())]
    b = results / "b"
    assert names[:3] == ["tiny", f"tiny ({b})", f"tiny ({b}, 2)"]
    assert sorted(names[3:]) == sorted(["blend", *BASELINES, f"popularity ({b})"])
    sampled = table.filter(pa.array((table["ranker"].to_numpy() != "markov") | (np.arange(len(table)) % 2 == 0)))
    pq.write_table(sampled, results / "b" / "ranks.parquet")
    assert main(command(results)) == 0
    assert f"note: markov of {b} is left out: ranked on a sample only" in capfd.readouterr().err


@pytest.mark.parametrize("metrics", ["coverage@10", "coverage@2", "hr@3", "hr", "hr@2,hr@2", "repeat_share"])
def test_metrics_not_determined_by_ranks_are_refused(results, metrics, capfd):
    assert main([*command(results)[:2], f"metrics=[{metrics}]"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1


def test_folders_without_a_result_and_invalid_outputs_are_refused(results, capfd):
    shutil.rmtree(results / "b")
    assert main(command(results)) == 2
    assert "error: expected result folders of python -m retrieval" in capfd.readouterr().err
    assert main([f"results=[{results / 'a'}]", f"output={results / 'page.txt'}"]) == 2
    (results / "folder.html").mkdir()
    for output in (results / "folder.html", results / "a" / "metrics.json" / "page.html"):
        assert main([f"results=[{results / 'a'}]", f"output={output}", "metrics=[hr@2]"]) == 2


def test_comparison_replaces_its_own_files_only(results, capfd):
    line = [f"results=[{results / 'a'}]", "metrics=[hr@2]"]
    for _ in range(2):
        assert main([*line, f"output={results / 'page.html'}"]) == 0
    before = (results / "a" / "metrics.json").read_bytes()
    (results / "notes.html").write_text("mine")
    for output in (results / "a" / "metrics.html", results / "notes.html"):
        assert main([*line, f"output={output}"]) == 2
        assert "error: expected an output that replaces no other file" in capfd.readouterr().err
    assert (results / "a" / "metrics.json").read_bytes() == before
    assert (results / "notes.html").read_text() == "mine"
    assert not (results / "notes.json").exists()


def test_results_of_ranking_models_are_named_as_such(results, capfd):
    summary = json.loads((results / "b" / "metrics.json").read_text())
    (results / "b" / "metrics.json").write_text(json.dumps(summary | {"test": {"auc/like": 0.5}}))
    (results / "b" / "ranks.parquet").unlink()
    assert main(command(results)) == 2
    assert "ranking models have none" in capfd.readouterr().err
