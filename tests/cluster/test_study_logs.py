"""Logs and datasets of a study: which experiments a log supports, and which data their variants read."""

from __future__ import annotations

import os

import pyarrow.parquet as pq
import pytest

import cluster.study.logs
import cluster.study.trials
from cluster.config import StudyOptions
from cluster.study.logs import Log, logs_of
from cluster.study.run import cells_of, chosen
from cluster.study.trials import StudyTrial
from etl.dataset import open_dataset
from etl.runtime.errors import InputError
from tests.etl.test_ctr_rows import ctr_log
from tests.support.engine import write_log
from tests.support.logs import generated_log


@pytest.mark.parametrize("unclicked", [True, False])
def test_negative_feedback_experiment_needs_a_log_with_unclicked_rows(tmp_path, unclicked):
    rows = [
        (user, item, int(not unclicked or item % 2), 0, 0, 0, "c", 1, 1, 1) for user in range(3) for item in range(24)
    ]
    log = write_log(tmp_path / "log.csv", rows)
    options = StudyOptions(work=str(tmp_path / "study"), logs=[f"qb_video:{log}"], seeds=1)
    (experiment,) = chosen(StudyOptions(experiments=["negative-feedback"]))
    assert bool(cells_of(options, logs_of(options)[0], experiment, {})) == unclicked


def test_logs_of_flat_rows_support_only_the_experiments_on_rows(tmp_path):
    rows, sessions = chosen(StudyOptions(experiments=["benchmark-rows", "cold-start"]))
    log = ctr_log(tmp_path / "ctr_data_1M.csv", rows=300, seed=1)
    options = StudyOptions(work=str(tmp_path / "study"), seeds=1, name="tenrec", input=str(tmp_path))
    (found,) = logs_of(options)
    assert (found.name, found.scenario, found.path) == ("ctr_data_1M", "ctr", log)
    assert len(cells_of(options, found, rows, {})) == len(rows.variants)
    assert cells_of(options, found, sessions, {}) == []
    # A generated log gives both; a user's log of sessions has no history columns.
    options = StudyOptions(work=str(tmp_path / "twin"), seeds=1, generated=["qb_video 60 2000"])
    (generated,) = logs_of(options)
    cells = cells_of(options, generated, rows, {})
    assert {cell.data.scenario for cell in cells} == {"ctr"}
    assert open_dataset(cells[0].data.path).row_files
    assert cells[0].data.best_possible == {}  # the best possible metrics are of sessions
    assert cells_of(options, generated, sessions, {})[0].data.scenario == "qb_video"
    own = generated_log(tmp_path / "log.csv", users=20, items=40, seed=1)
    options = StudyOptions(work=str(tmp_path / "own"), logs=[f"qb_video:{own}"], seeds=1)
    assert cells_of(options, logs_of(options)[0], rows, {}) == []


def test_merlin_rows_are_prepared_from_video_logs_with_enough_rows(tmp_path, capfd):
    (rows,) = chosen(StudyOptions(experiments=["merlin-rows"]))
    options = StudyOptions(work=str(tmp_path / "twin"), seeds=1, generated=["qb_video 2000 1000"])
    (log,) = logs_of(options)
    cells = cells_of(options, log, rows, {})
    dataset = open_dataset(cells[0].data.path)
    assert dataset.row_files
    assert len(cells) == len(rows.variants)
    (rows_file,) = (tmp_path / "twin" / "logs").glob("qb_video-2000-1000-*-merlin.csv")
    with rows_file.open() as stream:
        assert dataset.manifest.counts["exposures"] == sum(1 for _ in stream) - 1  # no row is sampled away
    # A log with too few rows skips the experiment, not the study.
    own = generated_log(tmp_path / "log.csv", users=20, items=400, seed=1)
    options = StudyOptions(work=str(tmp_path / "own"), logs=[f"qb_video:{own}"], seeds=1)
    assert cells_of(options, logs_of(options)[0], rows, {}) == []
    assert "merlin-rows: left out, log has too few of its rows" in capfd.readouterr().out
    assert cells_of(options, Log("ctr", "ctr", own), rows, {}) == []


def test_cold_start_logs_are_appended_to_the_same_users_qk_video_clicks(tmp_path):
    """Five users of the video log; two also have article clicks, one of them enough for a session of articles only."""
    folder = tmp_path / "files"
    folder.mkdir()
    rows = [(user, item, 1, 0, 0, 0, "0", 1, 0, 0) for user in range(1, 6) for item in range(1, 9)]
    write_log(folder / "QK-video.csv", rows)
    cold = [(2, 901), (4, 901), (4, 902), (4, 903), (4, 904)]
    lines = "".join(f"{user}.0,{item}.0,1.0,1.0,3.0,0.0\n" for user, item in cold)  # floats, as written by pandas
    (folder / "cold_data_0.3.csv").write_text(f"user_id,item_id,click,gender,age,like\n{lines}")
    options = StudyOptions(work=str(tmp_path / "study"), seeds=1, name="tenrec", input=str(folder))
    video, log = logs_of(options)
    cold_data, next_click = chosen(StudyOptions(experiments=["cold-data", "cold-start"]))
    assert (log.name, log.history) == ("cold_data_0.3", folder / "QK-video.csv")
    assert cells_of(options, log, next_click, {}) == cells_of(options, video, cold_data, {}) == []
    cells = {cell.variant.name: cell for cell in cells_of(options, log, cold_data, {})}
    found = {}
    for name in ("gru4rec, this log alone", "gru4rec, after the other log"):
        dataset = open_dataset(cells[name].data.path)
        raw = [None, *dataset.items()["item_id"].to_pylist()]
        tables = [pq.read_table(dataset.file(entry.path)) for entry in dataset.session_files]
        both = (zip(t["user_id"].to_pylist(), t["items"].to_pylist(), strict=True) for t in tables)
        found[name] = {user: [raw[item] for item in items] for pairs in both for user, items in pairs}
    assert found == {
        "gru4rec, this log alone": {4: [901, 902, 903, 904]},
        "gru4rec, after the other log": {2: [*range(1, 9), 901], 4: [*range(1, 9), 901, 902, 903, 904]},
    }


def trials_of(options: StudyOptions) -> list[StudyTrial]:
    experiments = chosen(options)
    return [cell.trial for log in logs_of(options) for e in experiments for cell in cells_of(options, log, e, {})]


def test_trials_of_a_changed_log_are_run_again_and_those_of_an_equal_one_not(tmp_path):
    log = generated_log(tmp_path / "log.csv", users=20, items=40, seed=1)
    options = StudyOptions(work=str(tmp_path / "study"), logs=[f"qb_video:{log}"], seeds=1, experiments=["first-rows"])
    before = {trial.run for trial in trials_of(options)}
    os.utime(log)
    assert {trial.run for trial in trials_of(options)} == before
    generated_log(log, users=20, items=40, seed=2)
    assert not before & {trial.run for trial in trials_of(options)}


def test_generated_logs_of_one_scenario_and_two_sizes_are_two_logs(tmp_path):
    sizes = ["qb_video 60 1000", "qb_video 80 1000"]
    options = StudyOptions(work=str(tmp_path), seeds=1, generated=sizes, experiments=["first-rows"])
    logs = logs_of(options)
    assert [log.name for log in logs] == ["twin of qb_video (qb_video-60-1000)", "twin of qb_video (qb_video-80-1000)"]
    (experiment,) = chosen(options)
    datasets = {cells_of(options, log, experiment, {})[0].data.fingerprint for log in logs}
    assert len(datasets) == 2


def test_generated_log_without_its_truth_is_made_again(tmp_path):
    options = StudyOptions(work=str(tmp_path), seeds=1, generated=["qb_video 60 1000"], experiments=["first-rows"])
    (trial, *_) = trials_of(options)
    truth = trial.data.log.truth_path.read_bytes()
    trial.data.log.truth_path.unlink()
    assert trial.data.best_possible == {}
    assert trials_of(options)[0].run == trial.run
    assert trial.data.log.truth_path.read_bytes() == truth
    assert trial.data.best_possible


def test_other_files_of_a_converted_log_are_converted_again(tmp_path, monkeypatch):
    """KuaiRand's own files are too large for a test: only whether the step is up to date is checked."""
    ran = []
    monkeypatch.setattr(cluster.study.logs, "run_step", lambda step, _: ran.append(step.key))
    for content in ("a", "a", "bc"):
        (tmp_path / "files").mkdir(exist_ok=True)
        file = tmp_path / "files" / "log.csv"
        if not file.exists() or file.read_text() != content:
            file.write_text(content)
        options = StudyOptions(name="kuairand", work=str(tmp_path / "study"), input=str(tmp_path / "files"))
        cluster.study.logs._make_log(logs_of(options)[0], tmp_path / "study")
    assert ran[0] == ran[1] != ran[2]


@pytest.mark.parametrize(
    ("words", "is_final"),
    [
        ("error: expected a known option, got x", True),
        ("error: expected room on the disk of /x, got a full disk", False),
        ("error: expected files and network that work, got [Errno 27] File too large", False),
    ],
)
def test_only_rejected_options_end_a_trial_for_ever(tmp_path, monkeypatch, words, is_final):
    log = generated_log(tmp_path / "log.csv", users=20, items=40, seed=1)
    options = StudyOptions(work=str(tmp_path / "study"), logs=[f"qb_video:{log}"], seeds=1, experiments=["first-rows"])
    (trial, *_) = trials_of(options)
    monkeypatch.setattr(cluster.study.trials, "run_logged", lambda *_: (2, words))
    if is_final:
        trial.execute()
        assert trial.failure == words
    else:
        with pytest.raises(InputError, match="run the study again"):
            trial.execute()
        assert not trial.is_done
