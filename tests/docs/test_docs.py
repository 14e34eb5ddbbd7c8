"""The documentation: its commands name options that exist, its example is what `etl` writes, its links resolve."""

from __future__ import annotations

import re
import shlex

import pyarrow.parquet as pq
import pytest

from tests.docs.options_page import PAGE, PROGRAMS, option_fields, page, schema_of
from tests.support.engine import build
from tests.test_imports import LIGHT

ROOT = PAGE.parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Words of each `python -m` command in the code blocks and in the inline code of a page."""
    blocks = BLOCK.findall(text)
    inline = re.findall(r"`(python -m [^`]+)`", BLOCK.sub("", text))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + inline
    actual = [shlex.split(line, comments=True) for line in lines if "python -m " in line and "ray job" not in line]
    return [words[words.index("python") + 2 :] for words in actual if "python" in words]


def test_options_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run python -m tests.docs.options_page"
    assert set(PROGRAMS.values()) == set(LIGHT)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_name_programs_and_options_that_exist(path):
    for program, *options in commands(path.read_text()):
        if program.startswith("tests."):
            assert (ROOT / program.replace(".", "/")).exists() or (ROOT / f"{program.replace('.', '/')}.py").is_file()
            continue
        names = {name for name, _ in option_fields(schema_of(program))}
        groups = {name.split(".")[0] for name in names if "." in name}
        for option in options:
            name = option.split("=")[0]
            if option.startswith("@"):  # a file of options
                continue
            assert name in names | groups | {"--help"}, (path.name, program, option)


def test_commands_are_found_in_the_pages():
    assert sum(len(commands(path.read_text())) for path in PAGES) > 30


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_point_to_existing_files(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).is_file(), target


def test_session_example_in_data_md_matches_the_programs_output(tmp_path):
    text = (ROOT / "docs" / "data.md").read_text()
    log = tmp_path / "log.csv"
    log.write_text(re.search(r"```csv\n(.*?)```", text, re.DOTALL)[1])
    options = next(words for words in commands(text) if "input=log.csv" in words)[3:]
    dataset = build([f"input={log}", f"output={tmp_path / 'data'}", *options])
    raw = dict(zip(*dataset.items(["item", "item_id"]).to_pydict().values(), strict=True))
    session = pq.read_table(dataset.file(dataset.session_files[0].path)).to_pylist()[0]
    drawn = {line.split()[0]: re.findall(r"\d+|train|valid|test", line) for line in text.splitlines() if line}
    assert drawn["clicks"] == [str(raw[item]) for item in session["items"]]
    assert drawn["role"] == ["train"] * (len(session["items"]) - 2) + ["valid", "test"]
    clicked = [flags & 128 for flags in session["exposure_feedback"]]
    shown = [str(raw[item]) for item, click in zip(session["exposure_items"], clicked, strict=True) if not click]
    assert drawn["shown"] == shown
    assert drawn["position"] == [str(position) for position in session["exposure_position"]]


def test_pages_have_at_most_150_lines():
    assert [path.name for path in PAGES if len(path.read_text().splitlines()) > 150 and path != PAGE] == []
