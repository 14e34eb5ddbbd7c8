"""Datasets, runs, bundles and results in an S3 store: same bytes as on a disk; killed runs and missing objects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pyarrow.fs as pa_fs
import pytest
import torch.distributed as dist

import etl.__main__
import retrieval.__main__
import trainer.__main__
import trainer.run.signals
from etl.dataset import open_dataset
from etl.engines.java import OLDEST_JAVA, java_version
from etl.logs.tenrec import expand_input
from etl.runtime.dataset_folder import DATASET
from etl.runtime.errors import InputError
from etl.runtime.object_store import Mirror, download_if_remote, filesystem, local_path, staged_output
from retrieval.bundle import open_bundle
from tests.support.engine import build
from tests.support.logs import generated_log
from tests.support.runs import SMALL
from tests.support.store import BUCKET, s3_server
from tests.support.workers import run_workers
from trainer.config import load
from trainer.distributed.world import World
from trainer.loop import train
from trainer.prepare import prepare
from trainer.run.run_folder import RunFolder

HOME = f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def server():
    with s3_server() as variables:
        yield variables


@pytest.fixture
def store(server, monkeypatch, tmp_path) -> str:
    """URI of a folder for this test alone, with an empty cache."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NEXTCLICK_CACHE", str(tmp_path / "cache"))
    return f"{HOME}/{tmp_path.name}"


def put(folder: Path, uri: str) -> str:
    """Upload a folder."""
    Mirror(uri, folder).push()
    return uri


@pytest.fixture
def data(fifty, store, tmp_path) -> str:
    shutil.copytree(fifty.path, tmp_path / "copy")
    return put(tmp_path / "copy", f"{store}/data")


def elsewhere(monkeypatch, tmp_path) -> None:
    """Switch to an empty cache, as on another machine that has downloaded nothing."""
    monkeypatch.setenv("NEXTCLICK_CACHE", str(tmp_path / "other"))


def small(data: str, output: object, *more: str) -> list[str]:
    return [f"data={data}", f"output={output}", "model=hybrid", *SMALL, *more]


def files_of(bundle: str | Path) -> list[tuple[str, str]]:
    return [(f.path, f.sha256) for f in open_bundle(bundle).manifest.files]


def test_push_and_pull_mirror_a_folder_exactly(store, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("one")
    (folder / "deep" / "b").write_bytes(bytes(range(256)) * 40_000)
    (folder / ".hidden").write_text("stays")
    mirror = Mirror(f"{store}/x", folder)
    mirror.push()
    assert mirror.listing().keys() == {"a", "deep/b"}
    copy = Mirror(f"{store}/x", tmp_path / "copy")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "stale").write_text("old")
    (tmp_path / "copy" / "a").write_text("two")  # the same size as the original
    copy.pull()
    assert sorted(p.name for p in copy.folder.rglob("*") if p.is_file()) == ["a", "b"]
    assert (copy.folder / "a").read_text() == "one"
    assert (copy.folder / "deep" / "b").read_bytes() == (folder / "deep" / "b").read_bytes()
    time.sleep(1.1)  # a store's times are whole seconds
    (folder / "a").write_text("six")
    (folder / "deep" / "b").unlink()
    mirror.push()
    copy.pull()
    assert (copy.folder / "a").read_text() == "six"
    assert mirror.listing().keys() == {"a"}


def test_push_sends_only_changed_files(store, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(name)
    mirror, sent = Mirror(f"{store}/x", folder), []
    send = Mirror.send
    monkeypatch.setattr(Mirror, "send", lambda self, names: sent.extend(names) or send(self, names))
    mirror.push()
    assert sorted(sent) == ["a", "b", "c"]
    sent.clear()
    (folder / "b").write_text("B")
    mirror.push()
    assert sent == ["b"]


def test_push_removes_the_manifest_first_and_sends_it_last(store, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("data", "manifest.json"):
        (folder / name).write_text("old")
    mirror = Mirror(f"{store}/x", folder)
    mirror.push(last="manifest.json")
    (folder / "data").write_text("newer")

    def broken(*_: object, **__: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr("etl.runtime.object_store.pa_fs.copy_files", broken)
    with pytest.raises(InputError, match="storage that answers"):
        mirror.push(last="manifest.json")
    assert "manifest.json" not in mirror.listing()


def test_object_names_outside_the_folder_are_refused(store, server, tmp_path):
    client = boto3.client("s3", endpoint_url=server["AWS_ENDPOINT_URL"])
    client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/evil/deep/../../outside", Body=b"x")
    with pytest.raises(InputError, match="names inside the folder"):
        Mirror(f"{store}/evil", tmp_path / "evil").pull()
    assert not (tmp_path / "outside").exists()
    with pytest.raises(InputError, match=r"without \.\."):
        local_path(f"{store}/../../etc")


@pytest.mark.parametrize("main", [trainer.__main__.main, retrieval.__main__.main])
def test_missing_input_in_the_store_is_reported(main, store, capsys):
    options = f"bundle={store}/none" if main is retrieval.__main__.main else "model=gru4rec"
    assert main([f"data={store}/none", f"output={store}/out", options]) == 2
    assert "expected a complete folder with manifest.json" in capsys.readouterr().err


def test_unreachable_store_is_reported(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="storage that answers"):
        open_dataset(f"{store}/data")


def test_partial_download_does_not_block_a_new_output(data, tmp_path):
    """A killed download leaves files without a manifest in the local copy."""
    with pytest.raises(InputError, match="exist yet"), staged_output(data, DATASET, overwrite=False):
        pass
    folder = local_path(data)
    (folder / "sessions").mkdir(parents=True, exist_ok=True)
    (folder / "sessions" / "part").write_text("x")
    with staged_output(data, DATASET, overwrite=True) as new:
        (new / "manifest.json").write_text('{"scenario": 1, "protocol": 1, "source": 1, "files": []}')
    assert Mirror(data, tmp_path).listing().keys() == {"manifest.json"}


def test_glob_without_a_file_in_the_store_is_reported(store):
    with pytest.raises(InputError, match="files that match the input"):
        expand_input(f"{store}/nothing/*.csv")


def test_changed_object_fails_the_hash_check(data):
    broken = local_path(data)
    download_if_remote(data)
    path = next(broken.glob("sessions/*"))
    other = bytearray(path.read_bytes())
    other[100] ^= 1
    path.write_bytes(other)
    put(broken, data)
    with pytest.raises(InputError, match="SHA-256 differs"):
        open_dataset(data)


def program(name: str, asked: list[str]) -> int:
    """Run a program in a subprocess that inherits the store's variables; a failure shows its stderr."""
    env = dict(os.environ) | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-m", name, *asked], env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    return done.returncode


@pytest.mark.spark
@pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer")
def test_sessions_are_read_from_and_written_to_a_store(store, tmp_path):
    (tmp_path / "logs").mkdir()
    log = generated_log(tmp_path / "logs" / "log.csv", users=20, items=30, seed=3)
    put(log.parent, f"{store}/logs")
    how = ["scenario=qb_video", "shards=2"]
    ours = build([f"input={log}", f"output={tmp_path / 'here'}", *how], partitions=1).manifest
    asked = [f"input={store}/logs/*.csv", f"output={store}/data", *how]
    assert program("etl", asked) == 0
    theirs = open_dataset(f"{store}/data").manifest
    assert [f.sha256 for f in theirs.files] == [f.sha256 for f in ours.files]
    assert etl.__main__.main(asked) == 2  # existing output is not replaced without overwrite


def test_train_and_evaluate_in_a_store_give_the_files_of_a_local_run(data, store, fifty, tmp_path, monkeypatch):
    """Trained on one machine and evaluated on another: same bytes as on a local disk."""
    assert trainer.__main__.main(small(str(fifty.path), tmp_path / "run", "train.refit=true")) == 0
    assert trainer.__main__.main(small(data, f"{store}/run", "train.refit=true")) == 0
    assert files_of(f"{store}/run/bundle") == files_of(tmp_path / "run" / "bundle")
    elsewhere(monkeypatch, tmp_path)
    assert trainer.__main__.main(small(data, f"{store}/run", "train.refit=true")) == 0  # finished: nothing to do
    for home, options in ((str(tmp_path), str(fifty.path)), (store, data)):
        asked = [f"bundle={home}/run/bundle", f"data={options}", f"output={home}/result", "index=hnsw"]
        assert retrieval.__main__.main(asked) == 0
    ours, theirs = (local_path(f"{home}/result") for home in (str(tmp_path), store))
    for name in ("ranks.parquet", "topk.parquet"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert "gates" in (local_path(f"{store}/result") / "report.html").read_text().lower()
    assert Mirror(f"{store}/result", tmp_path).listing().keys() >= {"metrics.json", "topk.parquet", "report.html"}


def test_killed_run_resumes_on_another_machine(data, store, fifty, tmp_path, monkeypatch):
    undisturbed = small(str(fifty.path), tmp_path / "run")
    assert trainer.__main__.main(undisturbed) == 0
    kill = (
        "import os, sys, trainer.loop as loop; from trainer.__main__ import main\n"
        "after = loop.Training._after_step\n"
        "def step(self, *rest):\n"
        "    after(self, *rest)\n"
        "    if self.progress.step == 13: self.writer.wait(); os.kill(os.getpid(), 9)\n"
        "loop.Training._after_step = step\n"
        "main(sys.argv[1:])"
    )
    asked = small(data, f"{store}/run")
    killed = subprocess.run([sys.executable, "-c", kill, *asked], env=dict(os.environ), check=False)
    assert killed.returncode == -9
    assert "checkpoints/step-000000010/state.json" in Mirror(f"{store}/run", tmp_path).listing()
    elsewhere(monkeypatch, tmp_path)
    assert trainer.__main__.main(asked) == 0
    assert files_of(f"{store}/run/bundle") == files_of(tmp_path / "run" / "bundle")


def one_of_two(rank: int, meet: str, caches: list[str], variables: dict[str, str], runs: list[list[str]]) -> None:
    os.environ.update(variables | {"NEXTCLICK_CACHE": caches[rank]})
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    for options in runs:
        config, _ = prepare(options)
        train(config, World.from_process_group())
    dist.destroy_process_group()


def test_two_workers_without_a_shared_disk_train_through_the_store(data, store, server, fifty, tmp_path):
    """Each worker has its own cache, as on two machines; the bundle holds the files of both."""
    more = ["train.epochs=4", "train.early_stopping_patience=1"]
    runs = [small(data, f"{store}/run", *more), small(str(fifty.path), tmp_path / "run", *more)]
    caches = [str(tmp_path / name) for name in ("one", "two")]
    run_workers(one_of_two, (str(tmp_path / "meet"), caches, server, runs), nprocs=2)
    assert files_of(f"{store}/run/bundle") == files_of(tmp_path / "run" / "bundle")
    assert not [name for name in Mirror(f"{store}/run", tmp_path).listing() if "building" in name]


@pytest.mark.cluster
def test_ray_workers_train_into_a_store(data, store, fifty, tmp_path):
    assert program("trainer", small(data, f"{store}/run", "ray.workers=2", "train.epochs=1")) == 0
    assert open_bundle(f"{store}/run/bundle", dataset=fifty.manifest.fingerprint).n_queries("test") == 50
    listed = filesystem(store)[0].get_file_info(pa_fs.FileSelector(filesystem(f"{store}/run")[1], recursive=True))
    assert not [info.path for info in listed if info.is_file and "/." in info.path]  # no leftovers of Ray or workers


def test_stop_request_is_read_from_the_store(store, monkeypatch):
    watch = trainer.run.signals.StopWatch(RunFolder.of(f"{store}/run"), World.alone())
    assert not watch(8)
    mirror = Mirror.for_uri(f"{store}/run")
    mirror.folder.mkdir(parents=True)
    (mirror.folder / trainer.run.signals.STOP).touch()
    mirror.send([trainer.run.signals.STOP])
    (mirror.folder / trainer.run.signals.STOP).unlink()
    assert not watch(16)  # polled a moment ago, so not yet again
    watch.looked = 0.0
    assert watch(24)


def test_output_folder_with_unrelated_objects_is_refused(store, data, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    put(tmp_path / "photos", f"{store}/photos")
    assert trainer.__main__.main(small(data, f"{store}/photos")) == 2
    assert "a fresh output folder" in capsys.readouterr().err
    assert load(small(data, f"{store}/photos")).output == f"{store}/photos"
    assert Mirror(f"{store}/photos", tmp_path).listing().keys() == {"cat.jpg"}
