"""The study: its declarations, its statistics and sentences, and a run that is killed and resumed."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import StudyOptions, load
from cluster.study import findings, trials
from cluster.study.experiment import Experiment, Variant, reference
from cluster.study.experiments import EXPERIMENTS
from cluster.study.findings import Estimate, answer, estimates_of
from cluster.study.logs import Data, Log, logs_of
from cluster.study.run import cells_of, chosen
from cluster.study.site import GENERATED, WIRING, _multi_task_of, _published, positives
from cluster.study.trials import StudyTrial, execute
from etl.config import load as load_etl
from etl.runtime.errors import InputError
from retrieval.bundle import open_bundle
from retrieval.config import load as load_retrieval
from retrieval.metrics.significance import gains, signed_rank
from tests.data import TINY
from tests.support.browser import CHROMIUM, opened
from tests.support.bundles import other_model
from tests.support.logs import generated_log
from tests.support.runs import SMALL
from trainer.config import load as load_trainer


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_experiments_name_existing_variants_and_valid_options(experiment):
    names = [variant.name for variant in experiment.variants]
    assert len(set(names)) == len(names)
    assert set(experiment.pairs) <= set(names)
    assert set(experiment.pairs.values()) - {""} <= set(names)
    for position, variant in enumerate(experiment.variants):
        assert set(variant.members) <= set(names[:position])
        assert bool(variant.members) != bool(variant.trainer)
        if variant.trainer:
            load_trainer(["data=d", "output=o", *variant.trainer])
        load_retrieval(["bundle=b", "data=d", "output=o", *variant.retrieval])
        load_etl(["input=l", "output=o", f"scenario={variant.scenario or 'qb_video'}", *variant.protocol])
        assert experiment.flat_rows == (variant.scenario == "ctr")


def test_experiments_are_unique_and_chosen_by_name():
    names = [experiment.name for experiment in EXPERIMENTS]
    assert len(set(names)) == len(names)
    assert [e.name for e in chosen(StudyOptions(experiments=["ladder", "next-click"]))] == ["ladder", "next-click"]
    assert len(chosen(StudyOptions())) == len(EXPERIMENTS)
    with pytest.raises(InputError, match=r"study\.experiments of next-click"):
        chosen(StudyOptions(experiments=["star"]))


@pytest.mark.parametrize("study", ["small", "twin", "kuairand", "tenrec"])
def test_presets_compose_and_report_missing_inputs(study, tmp_path):
    options = load(["pipeline=study", f"study={study}", f"study.input={tmp_path}"]).study
    assert options.name == study
    if study == "tenrec":
        with pytest.raises(InputError, match=r"logs for study=tenrec, got none .*QK-video.csv"):
            logs_of(options)
        (tmp_path / "QB-video.csv").touch()
        assert [(log.name, log.scenario) for log in logs_of(options)] == [("QB-video", "qb_video")]
    else:
        assert logs_of(options)
    with pytest.raises(InputError, match=r"study\.input=DIR"):
        logs_of(load(["pipeline=study", "study=kuairand"]).study)
    with pytest.raises(InputError, match="files, got qb_video:/nowhere"):
        logs_of(load(["pipeline=study", "study.logs=[qb_video:/nowhere]"]).study)
    with pytest.raises(InputError, match=r"study\.seeds of at least 1"):
        load(["pipeline=study", "study.seeds=0"])


def ranks_table(ranks):
    return pa.table({"user_id": range(len(ranks)), "rank": ranks})


def cells(monkeypatch, **by_variant):
    """Cells with given ranks (of users 0, 1, …) and AUCs, one per seed."""
    monkeypatch.setattr(findings, "ranks_of", lambda trial, ranker: ranks_table(trial.ranks))
    monkeypatch.setattr(findings, "test_metrics", lambda cell: cell.trial.test)
    made = []
    for name, seeds in by_variant.items():
        for seed, (ranks, auc) in enumerate(seeds):
            test = {"hr@20": float(np.mean(gains(np.array(ranks), "hr@20"))), "auc/like": auc}
            trial = SimpleNamespace(seed=seed, failure="", ranks=ranks, test=test)
            made.append(SimpleNamespace(variant=Variant(name, ()), trial=trial))
    return made


EXPERIMENT = Experiment("e", "?", "", (Variant("a", ()), Variant("b", ())), metrics=("hr@20", "auc/like"))


def test_estimates_average_over_seeds_and_tests_use_users_or_seeds(monkeypatch):
    users = 60
    first = [[1 if u < 20 else 50 for u in range(users)], [1 if u < 30 else 50 for u in range(users)]]
    second = [[1 if u < 40 else 50 for u in range(users)], [1 if u < 50 else 50 for u in range(users)]]
    options = cells(
        monkeypatch, a=list(zip(first, (0.6, 0.7), strict=True)), b=list(zip(second, (0.62, 0.74), strict=True))
    )
    actual = estimates_of(EXPERIMENT, options, {"hr@20": 0.9})
    assert actual["a", "hr@20"].mean == pytest.approx(25 / 60)
    assert actual["a", "hr@20"].spread == pytest.approx(np.std([20 / 60, 30 / 60], ddof=1))
    assert actual["a", "hr@20"].difference is None
    assert actual["b", "hr@20"].share_of_best == pytest.approx(45 / 60 / 0.9)
    own, other = (np.mean([gains(np.array(r), "hr@20") for r in ranks], axis=0) for ranks in (second, first))
    assert actual["b", "hr@20"].difference == pytest.approx(20 / 60)
    # Two tests on this table: the smaller p is doubled (Holm).
    p_rank, p_auc = signed_rank(own, other), 0.204833  # t = .03 / (.01 √2 / √2) = 3, one degree of freedom
    assert p_rank < p_auc
    assert actual["b", "hr@20"].p == pytest.approx(2 * p_rank)
    assert actual["b", "auc/like"].p == pytest.approx(p_auc, abs=1e-5)
    assert actual["b", "auc/like"].difference == pytest.approx(0.03)
    half = 12.7062 * 0.01  # Student's 97.5 % quantile with one degree of freedom × the standard error
    assert actual["b", "auc/like"].low == pytest.approx(0.03 - half, abs=1e-4)
    in_another_order = estimates_of(EXPERIMENT, [*options[:2], *options[:1:-1]], {})  # AUCs are paired by seed
    assert in_another_order["b", "auc/like"].low == pytest.approx(0.03 - half, abs=1e-4)


def test_answer_sentences_follow_from_the_estimates():
    sure, unsure = Estimate(0.3, None, 0.1, 0.05, 0.15, 0.001), Estimate(0.21, None, 0.01, -0.1, 0.1, 0.6)
    base = {("a", "hr@20"): Estimate(0.2)}
    assert answer(EXPERIMENT, "hr@20", base | {("b", "hr@20"): sure}) == (
        "HR@20 is highest for b (0.3000). Better than a: b +0.1000 [+0.0500, +0.1500], p 0.001."
    )
    assert answer(EXPERIMENT, "hr@20", base | {("b", "hr@20"): unsure}) == (
        "HR@20 is highest for b (0.2100). No difference beyond chance from a: b."
    )
    worse = Estimate(0.1, None, -0.1, -0.15, -0.05, 0.001)
    assert "a (0.2000). Worse than a: b -0.1000" in answer(EXPERIMENT, "hr@20", base | {("b", "hr@20"): worse})
    single = Estimate(0.1, None, -0.1)
    assert "Not tested against a: b -0.1000" in answer(EXPERIMENT, "hr@20", base | {("b", "hr@20"): single})
    assert reference(EXPERIMENT, EXPERIMENT.variants[0]) is None


@pytest.mark.cluster
def test_killed_study_resumes_and_its_site_shows_the_values_of_the_table(tmp_path):
    log, work = generated_log(tmp_path / "log.csv", users=60, items=60, seed=1), tmp_path / "study"
    small = [option for option in SMALL if not option.startswith(("ray.", "train.epochs"))]
    # An option for every trainer; no trial may fail.
    options = [
        *(
            "pipeline=study",
            "study.movielens=false",
            f"study.logs=[qb_video:{log}]",
            f"study.work={work}",
            "study.seeds=2",
        ),
        "study.experiments=[feedback,neighbours,first-rows]",
        f"study.trainer={shlex.join([*small, 'train.epochs=1', 'network.attention_heads=1'])}",
    ]
    command = [sys.executable, "-m", "cluster", *options]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while len(list(work.glob("runs/*/summary.json"))) < 3:
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = {path: path.stat().st_mtime_ns for path in work.glob("runs/*/summary.json")}
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ", 0 failed; table: " in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = pq.read_table(work / "trials.parquet").to_pylist()
    assert {row["experiment"] for row in rows} == {"feedback", "neighbours", "first-rows"}
    assert sum(row["experiment"] == "feedback" for row in rows) == 12
    site = work / "site"
    single = [r["test/auc/like"] for r in rows if r["experiment"] == "feedback" and r["variant"] == "rank_single"]
    with (site / "feedback-log.csv").open() as stream:
        table = {(row["variant"], row["metric"]): row for row in csv.DictReader(stream)}
    assert float(table["rank_single", "auc/like"]["mean"]) == pytest.approx(np.mean(single))
    assert f"{np.mean(single):.4f} ± {np.std(single, ddof=1):.4f}" in (site / "feedback.html").read_text()
    for page in site.glob("*.html"):
        for target in re.findall(r'href="([^"#:]+)"', page.read_text()):
            assert (site / target).is_file(), (page, target)
    if CHROMIUM:
        for page in ("index.html", "feedback.html", "neighbours.html"):
            actual = opened(Path(site / page), 390)
            assert (actual.errors, actual.requests, actual.violations) == ([], [], [])
            assert actual.width <= 390
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]


@pytest.fixture
def members(tmp_path):
    """Two finished trials without training: the tiny bundle, and one with other vectors."""
    data = Data(Log("tiny", "qb_video", tmp_path / "log.csv"), TINY / "data", "qb_video")
    made = tuple(
        StudyTrial(tmp_path, data, (f"model={name}",), ("blend=none", "baselines=[]", "cutoffs=[1,2]"), 0)
        for name in ("gru4rec", "sasrec")
    )
    shutil.copytree(TINY / "bundle", made[0].run / "bundle")
    other_model(made[1].run / "bundle")
    for number, trial in enumerate(made, 1):
        summary = {
            "valid": {"ndcg@20": 0.1},
            "parameters": {"total": 100 * number},
            "flops_per_example": 10 * number,
            "examples_per_second": 300.0 * number,
            "seconds": 2.0 * number,
        }
        (trial.run / "summary.json").write_text(json.dumps(summary))
    return made


def test_mean_trial_averages_its_members_and_adds_their_costs(members):
    mean = replace(members[0], trainer=(), members=members)
    assert not mean.is_done
    mean.execute()
    assert mean.is_done
    assert mean.failure == ""
    vectors = [open_bundle(trial.run / "bundle").manifest.dimension for trial in (*members, mean)]
    assert vectors[2] == vectors[0] + vectors[1]
    # One query of each model takes 1/300 + 1/600 seconds.
    assert mean.summary["examples_per_second"] == pytest.approx(200)
    assert (mean.summary["seconds"], mean.summary["flops_per_example"]) == (6.0, 30)
    assert mean.summary["parameters"]["total"] == 300
    assert 0 <= mean.metrics["test"]["hr@2"] <= 1
    # Killed between averaging and evaluation: the bundle stays and is evaluated.
    before = (mean.run / "bundle" / "manifest.json").stat().st_mtime_ns
    shutil.rmtree(mean.result)
    again = replace(mean)
    again.execute()
    assert again.is_done
    assert (mean.run / "bundle" / "manifest.json").stat().st_mtime_ns == before


def test_rejected_evaluation_does_not_fail_trials_of_the_run_with_other_options(members, monkeypatch):
    run_logged = trials.run_logged
    monkeypatch.setattr(
        trials, "run_logged", lambda command, log: (0, "") if command[0] == "trainer" else run_logged(command, log)
    )
    wrong = replace(members[0], retrieval=(*members[0].retrieval, "neighbours=0"))
    wrong.execute()
    assert "neighbours of at least 1" in wrong.failure
    assert wrong.is_done
    other = replace(members[0], retrieval=(*members[0].retrieval, "neighbours=100"))
    assert other.run == wrong.run
    assert (other.failure, other.is_done) == ("", False)
    # The bundle of the rejected evaluation is there, so an ensemble has all its members.
    mean = replace(members[0], trainer=(), members=(wrong, members[1]))
    mean.execute()
    assert (mean.failure, mean.is_done) == ("", True)


def test_mean_trial_with_a_failed_member_fails_with_its_error(members):
    (members[1].run / "failed.json").write_text(json.dumps({"error": "no rows", "command": []}))
    mean = replace(members[0], trainer=(), members=members)
    mean.execute()
    assert mean.is_done
    assert mean.failure == "a member failed: no rows"


def test_mean_trials_run_last_and_reference_their_members(tmp_path, monkeypatch):
    log = generated_log(tmp_path / "log.csv", users=20, items=40, seed=1)
    options = StudyOptions(work=str(tmp_path / "study"), logs=[f"qb_video:{log}"], seeds=2)
    (experiment,) = chosen(StudyOptions(experiments=["several-encoders"]))
    found = cells_of(options, logs_of(options)[0], experiment, {})
    means = [cell for cell in found if cell.variant.members]
    for cell in means:
        by_name = {(c.variant.name, c.trial.seed): c.trial for c in found}
        assert cell.trial.members == tuple(by_name[name, cell.trial.seed] for name in cell.variant.members)
    assert len({cell.trial.run for cell in means}) == len(means) == 4
    order = []
    monkeypatch.setattr(StudyTrial, "execute", lambda self: order.append(bool(self.members)))
    execute([cell.trial for cell in reversed(found)], 1, "study")
    assert order == sorted(order)


def test_published_results_are_shown_only_for_logs_of_their_scenario(tmp_path):
    rows, merlin_rows, sessions = chosen(StudyOptions(experiments=["benchmark-rows", "merlin-rows", "tenrec-code"]))

    def sources(experiment, scenario):
        cell = SimpleNamespace(data=SimpleNamespace(scenario=scenario))
        return [(source, header, rows) for source, header, rows in _published(experiment, [cell])]

    assert sources(rows, "qb_video") == sources(sessions, "qb_video") == []
    ((_, header, lines),) = sources(rows, "ctr")
    ((source, _, merlin),) = sources(merlin_rows, "ctr")
    assert header[1:] == ["AUC click", "AUC like"]
    assert ["MMoE", "0.7900", "0.9020"] in lines
    assert "Merlin" in source
    assert ["MMoE", "0.7826", "0.9217", "0.8396", "0.8804"] in merlin
    assert ["SASRec", "0.0502", "0.0194"] in sources(sessions, "qk_video")[0][2]


def test_only_generated_logs_and_movielens_are_said_to_be_so(tmp_path):
    options = StudyOptions(work=str(tmp_path), movielens=True, generated=["qb_video 9 9"], logs=[])
    movielens, twin = logs_of(options)
    others = [Log(name, "qb_video", tmp_path / f"{name}.csv") for name in ("twin-x", "MovieLens-mine")]
    for log, said in ((movielens, [WIRING]), (twin, [GENERATED]), *((other, []) for other in others)):
        assert list(_multi_task_of({}, log)) == said
    assert twin.converted("etl.merlin", tmp_path).original is twin


def test_auc_tables_state_the_number_of_positives(monkeypatch):
    tests = [{}, {"auc/like": 0.5, "positives/like": 1234, "positives/share": 9}]
    monkeypatch.setattr("cluster.study.site.test_metrics", lambda cell: cell)
    said = positives(["hr@20", "auc/like", "auc/like_given_click", "auc/share"], tests)
    assert said.startswith("Positives in test: like 1,234, share 9; an AUC's standard error is about 0.29")
    assert positives(["hr@20"], tests) == ""
    # 0.29: the standard deviation of the AUC of random scores, for 60 positives among many rows.
    rng = np.random.default_rng(0)
    aucs = [(rng.random(60)[:, None] > rng.random(2_000)).mean() for _ in range(400)]
    assert np.std(aucs) == pytest.approx(0.289 / 60**0.5, rel=0.1)
