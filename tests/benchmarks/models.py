"""Every model on real input and on the twin, and a ladder of changes that separates causes.

Runs use the programs' command lines on one core each, `NEXTCLICK_JOBS` at a time (default: number of cores).
They are in a permanent folder (`NEXTCLICK_BENCH`, default `runs/benchmarks`), so a benchmark that was stopped
resumes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from etl.dataset import open_dataset
from etl.twin.simulate import make_twin
from retrieval.bundle import open_bundle
from retrieval.evaluate import evaluate_feedback
from tests.benchmarks.expected import ACTIONS, Truth

TASKS = ("click", "like", "share", "follow")
TWIN = ("recipe=medium_dropout", "train.batch_tokens=1024", "train.epochs=6", "train.early_stopping_patience=2")
TWIN_RANK = ("train.learning_rate=0.001",)
"""For the QB twin, chosen on valid: 256 target clicks per step take twice as long for the same quality, epochs beyond
the third add nothing."""


@dataclass(frozen=True)
class Run:
    """One training run with its evaluation, whose options are `evaluation`."""

    name: str
    data: Path
    options: tuple[str, ...]
    seed: int = 0
    evaluation: tuple[str, ...] = ("baselines=[popularity]",)

    @property
    def folder(self) -> Path:
        return self.data.parent / "runs" / f"{self.name}-{self.seed}"


def work() -> Path:
    folder = Path(os.environ.get("NEXTCLICK_BENCH", "runs/benchmarks")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def program(name: str, *options: str) -> None:
    """Run a program on one core; prints its last output if it fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", name, *options], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(options)}: {done.stderr[-800:]}")


QB_USERS, QB_ITEMS = 34_240, 130_637
"""Users and items of QB-video as published."""


SMOOTHNESS = 0.7
"""The generator's default share of transitions that similar items share."""


def twin(
    correlation: float,
    users: int = QB_USERS,
    seed: int = 0,
    smoothness: float = SMOOTHNESS,
    items: int = QB_ITEMS,
    topics: bool = False,
) -> Path:
    """The sessions of a QB-video twin, at full size or with other numbers of users or items.

    With `topics` its categories are the hidden topics, on which tastes depend; else they are only correlated with them.
    """
    apart = f"-{users}" * (users != QB_USERS) + f"-seed-{seed}" * (seed != 0) + f"-items-{items}" * (items != QB_ITEMS)
    apart += f"-smoothness-{smoothness}" * (smoothness != SMOOTHNESS) + "-topics" * topics
    folder = work() / f"twin-{correlation}{apart}"
    log = folder / "log.csv"
    if not (folder / "data" / "manifest.json").exists():
        folder.mkdir(exist_ok=True)
        size = (f"users={users}", f"items={items}", f"seed={seed}")
        process = (f"task_correlation={correlation}", f"successor_smoothness={smoothness}")
        columns = ("observed_topics=true",) if topics else ()
        program("etl.twin", f"output={log}", "scenario=qb_video", *size, *process, *columns)
        program("etl", f"input={log}", f"output={folder / 'data'}", "scenario=qb_video", "overwrite=true")
    return folder / "data"


@cache
def truth_of(correlation: float, seed: int = 0) -> Truth:
    """The truth of a twin of full size."""
    return Truth.of(make_twin("qb_video", users=QB_USERS, items=QB_ITEMS, task_correlation=correlation, seed=seed))


def movielens(max_clicks: int = 30) -> Path:
    """The sessions of MovieLens-100K, of at most `max_clicks` clicks."""
    folder = work() / f"movielens{f'-last-{max_clicks}' * (max_clicks != 30)}"
    log = folder / "log.csv"
    if not (folder / "data" / "manifest.json").exists():
        folder.mkdir(exist_ok=True)
        program("etl.movielens", f"output={log}")
        options = (f"input={log}", f"output={folder / 'data'}", "scenario=qb_video", "overwrite=true")
        program("etl", *options, f"protocol.max_clicks={max_clicks}")
    return folder / "data"


def execute(runs: Iterable[Run], *, search: bool = True) -> dict[tuple[str, int], dict[str, Any]]:
    """Summary and test metrics of each run, by name and seed; without search only the AUCs."""

    def one(run: Run) -> dict[str, Any]:
        result = run.folder / "result"
        program(
            "trainer", f"data={run.data}", f"output={run.folder}", f"seed={run.seed}", "ray.workers=0", *run.options
        )
        summary = json.loads((run.folder / "summary.json").read_text())
        print(f"  {run.name}-{run.seed}: best epoch {summary['best_epoch']}", file=sys.stderr, flush=True)
        if not search:
            metrics = evaluate_feedback(open_bundle(run.folder / "bundle"), open_dataset(run.data))
            return {**summary, **metrics, "valid": summary["valid"]}
        if not (result / "metrics.json").exists():
            bundle = f"bundle={run.folder / 'bundle'}"
            options = (bundle, f"data={run.data}", f"output={result}", "threads=1", "overwrite=true")
            program("retrieval", *options, *run.evaluation)
        return {**summary, **json.loads((result / "metrics.json").read_text())}

    runs = list(runs)
    with ThreadPoolExecutor(int(os.environ.get("NEXTCLICK_JOBS", os.cpu_count() or 1))) as pool:
        return dict(zip(((run.name, run.seed) for run in runs), pool.map(one, runs), strict=True))


MODELS: dict[str, tuple[str, ...]] = {
    "gru4rec": ("model=gru4rec",),
    "srgnn": ("model=srgnn", "train.prefixes=8"),
    "sasrec": ("model=sasrec",),
    "nextitnet": ("model=nextitnet",),
    "hybrid": ("model=hybrid",),
    "hybrid ple": ("model=hybrid", "head=ple"),
    "hybrid gru4rec+sasrec": ("model=hybrid", "encoder=[gru4rec,sasrec]"),
    "rank_single": ("model=rank_single",),
    "rank_shared_bottom": ("model=rank_shared_bottom",),
    "rank_mmoe": ("model=rank_mmoe",),
    "rank_esmm": ("model=rank_esmm",),
    "rank_ple": ("model=rank_ple",),
}
SEEDED = ("gru4rec", "srgnn", "hybrid")


def model_runs(data: Path, *, on_twin: bool) -> list[Run]:
    runs = []
    for name, options in MODELS.items():
        extra = twin_options(options[0]) if on_twin else ()
        for seed in range(3 if name in SEEDED else 1):
            runs.append(Run(name.replace(" ", "-"), data, (*options, *extra), seed))
    return [replace(runs[0], evaluation=()), *runs[1:]]  # baselines do not depend on the run: once is enough


def twin_options(model: str) -> tuple[str, ...]:
    return (*TWIN, *TWIN_RANK) if model.startswith("model=rank") else TWIN


def models() -> None:
    """Every model on MovieLens-100K and on the QB twin: quality, also as a share of the best possible, and cost."""
    for title, data in (("QB-video twin", twin(0.5)), ("MovieLens-100K", movielens())):
        runs = model_runs(data, on_twin=data != movielens())
        actual = execute(runs)
        truth = best_possible(data)
        print(f"\n{title}: test, mean ± standard deviation over seeds; in brackets the share of the best possible")
        columns = ["hr@20", "ndcg@20", *(f"auc/{t}" for t in TASKS), *(f"auc/{t}_given_click" for t in TASKS[1:])]
        print("| model | " + " | ".join(columns) + " | parameters | MFLOP an example | events/s |")
        print("|---" * (len(columns) + 4) + "|")
        for name in dict.fromkeys(name for name, _ in actual):
            results = [result for (other, _), result in actual.items() if other == name]
            cells = [cell([r["test"].get(c) for r in results], truth.get(c)) for c in columns]
            first = results[0]
            cost = f"{first['parameters']['total']:,} | {first['flops_per_example'] / 1e6:.2f}"
            rate = np.mean([r["examples_per_second"] for r in results])
            print(f"| {name} | " + " | ".join(cells) + f" | {cost} | {rate:,.0f} |", flush=True)
        baselines = {name: split["test"] for name, split in actual["gru4rec", 0]["baselines"].items()}
        message = (
            f"{name} {test['hr@20']:.4f}/{test['ndcg@20']:.4f}" for name, test in baselines.items() if "hr@20" in test
        )
        print(f"hr@20/ndcg@20: {', '.join(message)}")
        if truth:
            expected_table(runs, actual, truth_of(0.5))


def expected_table(runs: Sequence[Run], found: dict[tuple[str, int], dict[str, Any]], truth: Truth) -> None:
    """AUCs in expectation over labels, of all runs that have feedback tasks."""
    best, by_name = truth.best(), {}
    for run in runs:
        tasks = [task for task in ACTIONS if found[run.name, run.seed]["test"].get(f"auc/{task}") is not None]
        by_name.setdefault(run.name, []).append(truth.of_bundle(run.folder / "bundle", open_dataset(run.data), tasks))
    print("\nAUC in expectation over labels; in brackets the share of the best possible")
    print("| model | " + " | ".join(key.replace(" | ", ", ") for key in best) + " |\n" + "|---" * (len(best) + 1) + "|")
    for name, values in by_name.items():
        if any(values):
            cells = [cell([value.get(key) for value in values], best[key]) for key in best]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def best_possible(data: Path) -> dict[str, float]:
    """The twin's best possible test metrics from its truth file; empty for real input."""
    path = data.parent / "log.csv.truth.json"
    return json.loads(path.read_text())["test"] if path.exists() else {}


def cell(values: list[float | None], best: float | None) -> str:
    if any(value is None for value in values):
        return "–"
    mean = np.mean(values)
    spread = f" ±{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{mean:.4f}{spread}" + (f" ({mean / best:.0%})" if best else "")


def task_weights(weight: float) -> str:
    """The option that gives each feedback task a weight; the next click's is 1."""
    return f"train.task_weights={{{','.join(f'{task}:{weight}' for task in TASKS)}}}"


def ladder(seeds: Sequence[int] = (0,)) -> None:
    """One cause per step: capacity, sharing, gates, parameters, exposures, task weights."""
    data, alike, wide = twin(0.5), task_weights(1), f"network.hidden_size={matched_hidden()}"
    steps: dict[str, tuple[str, ...]] = {
        "gru4rec": ("model=gru4rec",),
        "gru4rec-matched": ("model=gru4rec", wide),
        "gru4rec-matched-slow": ("model=gru4rec", wide, "train.network_learning_rate=0.01"),
        "hybrid-next": ("model=hybrid", "tasks=[next]"),
        "hybrid-shared-bottom": ("model=hybrid", "head=shared_bottom", alike),
        "hybrid-weights-1": ("model=hybrid", alike),
        "hybrid-detached": ("model=hybrid", "network.detach_items=true", alike),
        "hybrid-clicks-only": ("model=hybrid", "train.exposures=false", alike),
        "hybrid": ("model=hybrid",),
        "hybrid-weights-0.3": ("model=hybrid", task_weights(0.3)),
    }
    runs = [Run(n, data, (*options, *twin_options(options[0])), seed) for seed in seeds for n, options in steps.items()]
    actual = execute(runs)
    columns = ["hr@20", "ndcg@20", "auc/click"]
    truth = best_possible(data)
    print(f"\nQB-video twin, test over {len(seeds)} seeds; in brackets the share of the best possible")
    print("| step | " + " | ".join(columns) + " | network parameters |\n" + "|---" * (len(columns) + 2) + "|")
    for name in steps:
        results = [actual[name, seed] for seed in seeds]
        cells = [cell([r["test"].get(c) for r in results], truth.get(c)) for c in columns]
        print(f"| {name} | {' | '.join(cells)} | {results[0]['parameters']['networks']:,} |", flush=True)
    expected_table(runs, actual, truth_of(0.5))


def matched_hidden() -> int:
    """Hidden size with which `gru4rec` has about as many network parameters as the hybrid, both by their recipes."""
    from trainer.models.recommender import Recommender
    from trainer.recipe import with_recipe

    def size(model: str, hidden: int | None = None) -> int:
        config = with_recipe(["data=", "output=", f"model={model}"], QB_ITEMS)
        config.network.hidden_size = hidden or config.network.hidden_size
        return sum(p.numel() for p in Recommender(config).parameters())

    parameters = size("hybrid")
    return min(range(64, 512, 4), key=lambda hidden: abs(size("gru4rec", hidden) - parameters))
