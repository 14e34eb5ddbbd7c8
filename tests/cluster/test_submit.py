"""Submission: which program is started where, and invalid options."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from cluster import submit as submitting
from cluster.__main__ import main
from cluster.config import load, words
from cluster.submit import entrypoint
from etl.package import package
from tests.support.runs import SMALL

ROOT = Path(__file__).parents[2]


def test_nested_options_need_no_quotes():
    options = 'options=data=d model=hybrid tasks=[next,like] spark.master="local[1]"'
    config = load(["submit=train", options])
    assert shlex.split(config.options, posix=False) == [
        "data=d",
        "model=hybrid",
        "tasks=[next,like]",
        'spark.master="local[1]"',
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        ["submit=bake"],
        ["target=moon", "submit=etl"],
        ["action=dance"],
        ["submit=train", "action=up"],
        ["submit=train", "target=standalone", "address=spark://h:7077"],
        ["submit=train", "target=ray"],
        ["submit=etl", "target=standalone"],
        ["submit=pipeline", "target=standalone", "address=spark://h:7077", "pipeline=study"],
        ["submit=etl", "options=input=it's.csv output=o"],
        ["submit=etl", "target=standalone", "address=foo"],
        ["local.nodes=0", "action=up"],
        ["kubernetes.workers=[3,1]", "submit=train", "target=kubernetes"],
        ["kubernetes.claim=null", "submit=etl", "target=kubernetes"],
        ["action=status", "local.state=/nowhere"],
        ["submit=train", "target=ray", "address=http://127.0.0.1:1"],
    ],
)
def test_invalid_options_fail_with_a_one_line_error(wrong, capfd):
    assert main(wrong) == 2
    err = capfd.readouterr().err
    assert err.strip().splitlines()[-1].startswith("error: expected ")
    assert "Traceback" not in err


def test_pipeline_on_spark_gets_the_master_as_one_option(monkeypatch):
    taken = []
    monkeypatch.setattr(submitting, "run_pipeline", lambda options: taken.append(words("etl", options.etl)) or "")
    options = ["pipeline.input=log.csv", "pipeline.etl=shards=2 'note=a b'"]
    assert main(["submit=pipeline", "target=standalone", "address=spark://host:7077", *options]) == 0
    assert taken == [["shards=2", "note=a b", "spark.master=spark://host:7077"]]


def test_local_submission_runs_the_program(fifty, tmp_path):
    small = " ".join(SMALL)
    run = tmp_path / "run"
    options = f"options=data={fifty.path} output={run} model=gru4rec {small} train.epochs=1"
    assert main(["submit=train", options]) == 0
    assert main(["submit=evaluate", f"options=bundle={run / 'bundle'} data={fifty.path} output={tmp_path / 'r'}"]) == 0
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["model"] == "gru4rec"
    with pytest.raises(SystemExit) as left:
        main(["submit=train", "options=data=/nowhere output=x model=gru4rec"])
    assert left.value.code == 2


def test_package_contains_all_of_etl_and_nothing_else(tmp_path):
    package(tmp_path / "a.zip")
    names = zipfile.ZipFile(tmp_path / "a.zip").namelist()
    tracked = {
        str(p.relative_to(ROOT)) for p in (ROOT / "etl").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert set(names) == tracked
    assert "etl/conf/config.yaml" in names


def test_pipeline_is_submitted_to_ray_with_its_own_options_only():
    options = ["submit=pipeline", "target=ray", "address=http://h:8265", "pipeline=demo", "pipeline.work=/shared/w"]
    line = submitting.entrypoint(load(options), options)
    assert line == "python -m cluster pipeline=demo pipeline.work=/shared/w pipeline.on_ray=true"


@pytest.mark.parametrize("program", ["etl", "pipeline"])
def test_spark_workers_use_the_interpreter_given_by_the_python_option(program, monkeypatch):
    seen = []
    monkeypatch.setenv("PYSPARK_PYTHON", "before")
    monkeypatch.setattr(submitting, "require_master", lambda master: seen.clear())
    monkeypatch.setattr(submitting, "run", lambda _, env: seen.append(env["PYSPARK_PYTHON"]) or 0)
    monkeypatch.setattr(submitting, "run_pipeline", lambda _: seen.append(os.environ["PYSPARK_PYTHON"]))
    options = [f"submit={program}", "target=standalone", "address=spark://h:7077", "python=/opt/env/bin/python"]
    assert submitting.submit(load(options), options) == 0
    assert seen == ["/opt/env/bin/python"]


def test_ray_gets_the_code_the_network_interface_and_the_locked_packages():
    options = ["submit=train", "target=ray", "address=http://h:8265", "options=data=d output=o model=gru4rec"]
    plain = submitting.runtime_env(load(options))
    assert set(plain) == {"working_dir", "env_vars"}
    assert plain["working_dir"] == str(ROOT)
    more = submitting.runtime_env(load([*options, "interface=eth1", "install=true"]))
    assert more["pip"] == str(ROOT / "requirements.lock")
    named = {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "eth1"}
    assert more["env_vars"] == plain["env_vars"] | named


def test_working_directory_uploaded_by_ray_is_small():
    ignored = [line.rstrip("/") for line in (ROOT / ".rayignore").read_text().split()]
    size = 0
    for path in ROOT.iterdir():
        if path.name not in ignored:
            size += sum(
                p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file() and "__pycache__" not in p.parts
            )
    assert size < 3 << 20


@pytest.mark.parametrize("target", ["local", "ray"])
def test_submitted_study_gets_its_options(target):
    options = ["submit=pipeline", f"target={target}", "pipeline=study", "study=twin", "study.seeds=5", "study.work=w"]
    config = load([*options, "address=http://h:8265"])
    line = submitting.local_command(config, options) if target == "local" else shlex.split(entrypoint(config, options))
    assert load(line[3:]).study == config.study


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_program_gives_the_exit_status_of_a_shell(number):
    line = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(number)})"]
    assert submitting.run(line) == 128 + number


def test_sigterm_reaches_the_submitted_program(tmp_path):
    """The program ends as it wants to, here with a file, and the submission ends after it."""
    ended, started = tmp_path / "ended", tmp_path / "started"
    inner = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(ended)!r}).touch(), sys.exit(143)))\n"
        f"pathlib.Path({str(started)!r}).touch()\ntime.sleep(60)"
    )
    outer = f"import sys; from cluster.submit import run; sys.exit(run([sys.executable, '-c', {inner!r}]))"
    process = subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not started.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    assert ended.exists()
