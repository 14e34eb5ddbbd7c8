"""Output folders: all-or-nothing, and unrelated files are never replaced."""

from __future__ import annotations

import json
import threading

import pytest

from etl.runtime.dataset_folder import DATASET
from etl.runtime.errors import InputError
from etl.runtime.output_file import new_file
from etl.runtime.output_folder import OutputFolderType, listed_files, staged
from retrieval.bundle_folder import BUNDLE
from retrieval.result_folder import RESULT
from tests.support.mounts import mounted

KIND = OutputFolderType("a thing", "last.json", lambda data: listed_files(data, {"thing"}, "last.json"))


def make(output, content: str, **options) -> None:
    with staged(output, KIND, **{"overwrite": True} | options) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a").write_text(content)
        (folder / "last.json").write_text(json.dumps({"thing": content, "files": ["part/a"]}))


def write_file(path, text) -> None:
    with new_file(str(path)) as file:
        file.write_text(text)


def content(output) -> str:
    actual = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    assert actual == {"part/a", "last.json"}
    assert json.loads((output / "last.json").read_text())["thing"] == (output / "part" / "a").read_text()
    return (output / "part" / "a").read_text()


def test_overwrite_replaces_only_listed_files_of_the_same_program(tmp_path):
    output = tmp_path / "out"
    make(output, "1")
    make(output, "2")
    assert content(output) == "2"
    (output / "notes.txt").write_text("mine")
    (output / "part" / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"got notes.txt, part/link \("):
        make(output, "3")
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    (output / "part" / "link").unlink()
    with pytest.raises(InputError, match="inputs outside the output"):
        make(output, "3", inputs=[str(tmp_path / "elsewhere"), str(output / "part" / "a")])
    with pytest.raises(InputError, match="add overwrite=true"):
        make(output, "3", overwrite=False)
    assert content(output) == "2"


def test_kind_of_a_folder_is_recognised_by_its_manifest(tiny):
    kinds = {"data": DATASET, "bundle": BUNDLE, "result": RESULT}
    (tiny / "result" / "metrics.json").write_text('{"ties": "against", "candidates": "all"}')
    assert {(name, k) for name in kinds for k in kinds if kinds[k].is_complete(tiny / name)} == {(k, k) for k in kinds}
    for name in ("data", "bundle"):
        files = {p.relative_to(tiny / name).as_posix() for p in (tiny / name).rglob("*") if p.is_file()}
        assert kinds[name].listed(tiny / name) == files
    assert KIND.listed(tiny / "data") is None
    for text in ("[]", "{", '{"thing": 1}', '{"thing": 1, "files": [{}]}', "1"):
        assert KIND.files(text.encode()) is None


def test_unrelated_folder_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="output of this program"):
        make(tmp_path / "home", "1")
    assert (tmp_path / "home" / "letter.txt").read_text() == "mine"


def test_failed_build_leaves_no_files(tmp_path):
    def fail():
        with staged(tmp_path / "out", KIND, overwrite=False) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("disk full, say")

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_symlink_is_kept_and_its_target_is_replaced(tmp_path):
    make(tmp_path / "target", "1")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    make(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "target") == "2"
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    make(tmp_path / "dangling", "3")
    assert content(tmp_path / "new") == "3"


def test_second_of_two_concurrent_jobs_does_not_replace_the_firsts_output(tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    def first():
        with staged(tmp_path / "out", KIND, overwrite=False) as folder:
            begun.set()
            go_on.wait(20)
            (folder / "last.json").write_text('{"thing": 1, "files": []}')

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait(20)
    threading.Timer(0.3, go_on.set).start()
    with pytest.raises(InputError, match="does not exist yet"):
        make(tmp_path / "out", "2", overwrite=False)
    thread.join()
    assert (tmp_path / "out" / "last.json").read_text() == '{"thing": 1, "files": []}'


def killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["another filesystem", "bound folder"])
def test_output_at_a_mount_point_is_written_and_replaced(tmp_path, kind, monkeypatch):
    (tmp_path / "bound").mkdir()
    options = ("-t", "tmpfs", "tmpfs") if kind == "another filesystem" else ("--bind", str(tmp_path / "bound"))
    with mounted(tmp_path / "mount point", *options) as output:
        make(output, "1", overwrite=False)
        assert content(output) == "1"
        make(output, "2")
        assert content(output) == "2"
        with monkeypatch.context() as patch:
            patch.setattr("etl.runtime.output_folder._move_entries", killed)
            with pytest.raises(KeyboardInterrupt):
                make(output, "3")
        with pytest.raises(InputError, match="overwrite=true"):
            make(output, "4", overwrite=False)
        assert content(output) == "2"


def test_unusable_output_paths_are_reported_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with mounted(tmp_path / "locked", "-t", "tmpfs", "-o", "ro", "tmpfs") as locked:
        for path in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / ("n" * 250), locked / "out", locked):
            with pytest.raises(InputError, match="expected an output folder"):
                make(path, "1")
        for path in (tmp_path, tmp_path / "file" / "out", tmp_path / ("n" * 256), locked / "out"):
            with pytest.raises(InputError, match="expected an output file"):
                write_file(path, "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "locked"]


def test_output_files_are_all_or_nothing(tmp_path):
    write_file(tmp_path / "deep" / "a.csv", "1")
    with pytest.raises(TypeError):
        write_file(tmp_path / "deep" / "a.csv", 2)
    assert [p.read_text() for p in (tmp_path / "deep").iterdir()] == ["1"]
    for wrong in ("s3://bucket/a.csv", str(tmp_path), "/dev/null"):
        with pytest.raises(InputError):
            write_file(wrong, "3")
