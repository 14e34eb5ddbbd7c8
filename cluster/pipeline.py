"""The pipeline: log → dataset → run → result, one process per step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.config import PipelineOptions, parse_run, words
from cluster.steps import Step, log_fingerprints, run_step, time_by_step
from etl.config import load as load_etl
from etl.movielens import titles_path
from etl.runtime.dataset_folder import MANIFEST, is_dataset
from etl.runtime.files import sha256_of
from etl.runtime.locks import locked
from etl.runtime.option_files import expand_files
from retrieval.bundle_folder import BUNDLE, RUN_BUNDLE
from retrieval.result_folder import METRICS, REPORT, is_result
from trainer.run.folder import is_finished

WAIT_SECONDS = 3600.0


def run_pipeline(options: PipelineOptions) -> str:
    """Run all unfinished steps.

    Returns:
        The results table, the paths of the reports, and the time of each step.
    """
    work = Path(options.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    # A second pipeline on the same folder waits for the first, and then has nothing to do.
    with locked(work / "pipeline", wait_seconds=WAIT_SECONDS):
        data = prepare_data(options, work)
        runs = [parse_run(run) for run in options.models]
        for name, model_options in runs:
            run_step(training(options, work, data, name, model_options), work / "steps")
        for name, _ in runs:
            run_step(evaluation(options, work, data, name), work / "steps")
    names = [name for name, _ in runs]
    steps = ["movielens"] * (options.input is None) + ["sessions"]
    steps += [f"{kind} {name}" for kind in ("train", "evaluate") for name in names]
    return f"{results(work, names)}\n{time_by_step(steps, work / 'steps')}"


def prepare_data(options: PipelineOptions, work: Path) -> Path:
    """Build the dataset, from the given log or else from MovieLens-100K."""
    if options.input is None:
        path = work / "movielens.csv"
        run_step(Step("movielens", ["etl.movielens", f"output={path}"], path, [], has_titles), work / "steps")
        log, inputs = str(path), [sha256_of(path)]
    else:
        log, inputs = options.input, []
    data = work / "data"
    command = [
        "etl",
        f"input={log}",
        f"output={data}",
        f"scenario={options.scenario}",
        "overwrite=true",
        *words("pipeline.etl", options.etl),
    ]
    config = load_etl(expand_files(command[1:]))
    inputs += log_fingerprints(config.user_logs if options.input is None else [*config.inputs, *config.user_logs])
    if config.items_from:
        from etl.dataset import open_dataset  # slow import, not needed for --help

        inputs.append(open_dataset(config.items_from, verify=False).manifest.fingerprint)
    run_step(Step("sessions", command, data, inputs, is_dataset), work / "steps")
    return data


def has_titles(log: Path) -> bool:
    """Whether MovieLens' log and titles exist."""
    return log.is_file() and Path(titles_path(str(log))).is_file()


def training(options: PipelineOptions, work: Path, data: Path, name: str, model_options: list[str]) -> Step:
    """The step that trains a model; if killed, it resumes from its latest checkpoint."""
    run = work / name

    def is_complete(run: Path) -> bool:
        return is_finished(run) and BUNDLE.has_all_files(run / RUN_BUNDLE)

    command = ["trainer", f"data={data}", f"output={run}", *words("pipeline.trainer", options.trainer)]
    command += model_options
    return Step(f"train {name}", command, run, [sha256_of(data / MANIFEST)], is_complete, resumes=True)


def evaluation(options: PipelineOptions, work: Path, data: Path, name: str) -> Step:
    """The step that evaluates a trained model."""
    bundle, result = work / name / RUN_BUNDLE, work / f"{name}-result"
    command = [
        "cluster.evaluate" if options.on_ray else "retrieval",
        f"bundle={bundle}",
        f"data={data}",
        f"output={result}",
        "overwrite=true",
        *([f"titles={titles_path(str(work / 'movielens.csv'))}"] if options.input is None else []),
        *words("pipeline.retrieval", options.retrieval),
    ]
    return Step(f"evaluate {name}", command, result, [sha256_of(bundle / MANIFEST)], is_result)


def results(work: Path, names: list[str]) -> str:
    """One table of all runs, and the paths of their reports."""
    from retrieval.report.page import table_text

    metrics: list[dict[str, Any]] = [json.loads((work / f"{name}-result" / METRICS).read_text()) for name in names]
    table = metrics[0] | {"model": names[0]}
    others = {name: {"test": result.get("test", {})} for name, result in zip(names[1:], metrics[1:], strict=True)}
    lines = [table_text(table | {"baselines": others | metrics[0]["baselines"]}), ""]
    lines += [f"report of {name}: {work / f'{name}-result' / REPORT}" for name in names]
    return "\n".join(lines)
