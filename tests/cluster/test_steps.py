"""A pipeline's steps: which are skipped, run again or refused, and what happens to earlier outputs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.config import PipelineOptions, parse_run
from cluster.pipeline import evaluation, run_pipeline, training
from cluster.steps import Step, log_fingerprints, run_step, time_by_step
from etl.runtime.errors import InputError
from tests.support.logs import generated_log

SMALL = (
    "network.embedding_dim=8 network.hidden_size=8 train.batch_tokens=64 train.negatives=20 train.epochs=1 "
    "ray.workers=0 train.valid_sessions=30"
)


def step_of(output: Path, *more: str, resumes: bool = False) -> Step:
    command = ["tests.support.touch", str(output), *more]
    return Step("write", command, output, [], lambda path: path.exists(), resumes=resumes)


def test_time_of_each_step_is_shown_with_its_share_of_the_total(tmp_path):
    for name, seconds in (("sessions", 6.0), ("train-gru4rec", 234.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"done": True, "seconds": seconds}))
    message = time_by_step(["sessions", "train gru4rec", "evaluate gru4rec"], tmp_path)
    assert message == "time: sessions 6 s (2 %), train gru4rec 4 min (98 %), evaluate gru4rec 0 s (0 %)"


def test_step_runs_again_only_for_other_options(tmp_path):
    output = tmp_path / "out"
    run_step(step_of(output, "a"), tmp_path / "steps")
    stamp = output.stat().st_mtime_ns
    run_step(step_of(output, "a"), tmp_path / "steps")
    assert (output.read_text(), output.stat().st_mtime_ns) == ("a", stamp)
    run_step(step_of(output, "b"), tmp_path / "steps")
    assert output.read_text() == "b"


def test_options_in_a_file_count_by_their_content(tmp_path):
    output, file = tmp_path / "out", tmp_path / "more.yaml"
    step = Step("write", ["p", f"output={output}", f"@{file}"], output, [], Path.exists)
    keys = []
    for text in ("a: 1", "a: 2", "a:    1"):
        file.write_text(text)
        keys.append(step.key)
    assert keys[0] == keys[2] != keys[1]
    same = Step("write", ["p", f"output={output}", "a=1"], output, [], Path.exists)
    assert same.key == keys[0]


def test_options_of_programs_are_split_as_a_shell_splits_them(tmp_path):
    for file in ("data/manifest.json", "g/bundle/manifest.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    options = PipelineOptions(input="log.csv", trainer="tasks='[next, click]'", retrieval='titles="a b.csv"')
    step = training(options, tmp_path, tmp_path / "data", "g", ["model=gru4rec"])
    assert step.command[3:] == ["tasks=[next, click]", "model=gru4rec"]
    assert evaluation(options, tmp_path, tmp_path / "data", "g").command[-1] == "titles=a b.csv"
    assert parse_run("h model=hybrid 'tasks=[next, like]'") == ("h", ["model=hybrid", "tasks=[next, like]"])


def test_program_ends_with_its_parent_and_does_not_ignore_sigpipe():
    child = json.dumps(["bash", "-c", "echo $PPID $$ $(awk '/SigIgn/ {print $2}' /proc/$$/status); exec sleep 60"])
    parent = f"import subprocess; from cluster.child import dies_with_parent as d; subprocess.run(d({child}))"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    of_parent, pid, ignored = process.stdout.readline().split()
    assert int(of_parent) == process.pid
    assert not int(ignored, 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_training_depends_on_the_dataset_and_evaluation_on_the_bundle(tmp_path):
    options, data, bundle = PipelineOptions(), tmp_path / "data", tmp_path / "m" / "bundle"
    keys = []
    for of_data, of_bundle in ("11", "12", "22"):
        for folder, text in ((data, of_data), (bundle, of_bundle)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").write_text(text)
        keys.append((training(options, tmp_path, data, "m", []).key, evaluation(options, tmp_path, data, "m").key))
    assert keys[0][0] == keys[1][0] != keys[2][0]
    assert keys[0][1] != keys[1][1] == keys[2][1]


def test_output_that_no_step_has_made_is_refused_and_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    for resumes in (False, True):
        with pytest.raises(InputError, match="of others"):
            run_step(step_of(tmp_path / "out", "a", resumes=resumes), tmp_path / "steps")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"


class TestTrainingRuns:
    """Runs take hours: a run with other options is kept, and none is lost to a mistyped option."""

    def run(self, folder: Path, *more: str) -> None:
        run_step(step_of(folder / "run", *more, resumes=True), folder / "steps")

    def test_run_with_other_options_is_kept_as_previous(self, tmp_path):
        for text in ("a", "b", "c"):
            self.run(tmp_path, "--folder", text)
        assert (tmp_path / "run" / "config.yaml").read_text() == "c"
        assert (tmp_path / "run.previous" / "config.yaml").read_text() == "b"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.previous", "steps"]

    def test_rejected_options_leave_the_run_and_its_record(self, tmp_path):
        self.run(tmp_path, "--folder", "a")
        record = (tmp_path / "steps" / "write.json").read_bytes()
        with pytest.raises(InputError, match="exit status 2"):
            self.run(tmp_path, "--refuse", "b")
        assert (tmp_path / "steps" / "write.json").read_bytes() == record
        assert (tmp_path / "run" / "config.yaml").read_text() == "a"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "steps"]

    def test_run_set_aside_by_a_killed_pipeline_becomes_the_previous_one(self, tmp_path):
        self.run(tmp_path, "--folder", "a")
        record = tmp_path / "steps" / "write.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"done": False}))
        (tmp_path / "run").rename(tmp_path / ".run.replaced")
        (tmp_path / "run").mkdir()  # the new one has begun
        (tmp_path / "run" / "config.yaml").write_text("partial")
        self.run(tmp_path, "--folder", "a")
        assert (tmp_path / "run.previous" / "config.yaml").read_text() == "a"

    def test_files_of_others_in_the_place_of_the_previous_run_stay(self, tmp_path):
        (tmp_path / "run.previous").mkdir()
        (tmp_path / "run.previous" / "mine.txt").touch()
        self.run(tmp_path, "--folder", "a")
        with pytest.raises(InputError, match="move them away"):
            self.run(tmp_path, "--folder", "b")
        assert (tmp_path / "run.previous" / "mine.txt").exists()


def test_logs_of_a_list_or_glob_are_fingerprinted_each(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("x")
    glob = [str(tmp_path / "*.csv")]
    before = log_fingerprints(glob)
    assert before == log_fingerprints([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    (tmp_path / "b.csv").write_text("xy")
    changed = log_fingerprints(glob)
    assert changed[0] == before[0]
    assert changed[1] != before[1]
    (tmp_path / "c.csv").write_text("x")
    assert len(log_fingerprints(glob)) == 3
    (uri,) = log_fingerprints([(tmp_path / "b.csv").as_uri()])
    os.utime(tmp_path / "b.csv", ns=(0, 0))
    assert log_fingerprints([(tmp_path / "b.csv").as_uri()]) != [uri]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> PipelineOptions:
    """A finished pipeline of one small model; its log is two files, one named by a URI."""
    folder = tmp_path_factory.mktemp("pipeline")
    generated_log(folder / "log.csv", users=40, items=50, seed=1)
    head, *rows = (folder / "log.csv").read_text().splitlines(keepends=True)
    (folder / "a.csv").write_text(head + "".join(rows[: len(rows) // 2]))
    (folder / "b.csv").write_text(head + "".join(rows[len(rows) // 2 :]))
    shutil.copy(folder / "log.csv", folder / "users.csv")
    options = PipelineOptions(
        name="qb_video",
        work=str(folder / "work"),
        input=f"[{folder / 'a.csv'},{(folder / 'b.csv').as_uri()}]",
        models=["g model=gru4rec"],
        trainer=SMALL,
        retrieval="baselines=[] blend=none",
        etl=f"engine=local processes=1 users_from={folder / 'users.csv'}",
    )
    run_pipeline(options)
    return options


def done_again(options: PipelineOptions, capfd) -> list[str]:
    """The steps that a rerun of the pipeline skips."""
    capfd.readouterr()
    run_pipeline(options)
    lines = capfd.readouterr().out.splitlines()
    return [line.partition(":")[0] for line in lines if line.endswith("already done")]


def test_pipeline_skips_what_is_complete_and_makes_what_was_deleted(pipeline, capfd):
    work = Path(pipeline.work)
    assert done_again(pipeline, capfd) == ["sessions", "train g", "evaluate g"]
    bundle = (work / "g" / "bundle" / "manifest.json").read_bytes()
    checkpoints = {path.name for path in (work / "g" / "checkpoints").iterdir()}
    shutil.rmtree(work / "g" / "bundle")
    assert done_again(pipeline, capfd) == ["sessions", "evaluate g"]
    assert (work / "g" / "bundle" / "manifest.json").read_bytes() == bundle
    assert {path.name for path in (work / "g" / "checkpoints").iterdir()} == checkpoints
    shutil.rmtree(work / "data" / "sessions")
    assert done_again(pipeline, capfd) == ["train g", "evaluate g"]
    (work / "g-result" / "report.html").unlink()
    assert done_again(pipeline, capfd) == ["sessions", "train g"]


@pytest.mark.parametrize("name", ["a.csv", "b.csv", "users.csv"])
def test_pipeline_runs_again_if_a_file_that_it_read_has_changed(pipeline, name, capfd):
    path = Path(pipeline.work).parent / name
    os.utime(path, ns=(0, 0))
    assert "sessions" not in done_again(pipeline, capfd)
    assert done_again(pipeline, capfd) == ["sessions", "train g", "evaluate g"]
