"""Quality on public sequences with published results: models × data × seeds, without and with a refit.

`NEXTCLICK_SEQUENCES` gives the files (one user per line: user id, then items in time order), separated by `:`. As in
the published results: sequences of three items or more, the last fifty of each, the last item for test and
the one before for validation, ranked among all items that the user has not seen.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.metrics.significance import gains, interval
from retrieval.ranks_file import read_ranks
from tests.benchmarks.models import Run, execute, program, work
from tests.support.sequences import convert

MODELS: dict[str, tuple[str, ...]] = {
    "gru4rec": ("model=gru4rec",),
    "hybrid": ("model=hybrid",),
    "sasrec": ("model=sasrec",),
    "nextitnet": ("model=nextitnet",),
    "srgnn": ("model=srgnn", "train.prefixes=8"),
}
"""Such files have only clicks: the hybrid drops its feedback tasks and is `tasks=[next]`."""
RECIPE = ("recipe=small",)
METRICS = ("hr@10", "ndcg@10")
PROTOCOL = ("protocol.min_clicks=3", "protocol.max_clicks=50")


def sequences(seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """One table per file, one line per model: mean over seeds, bootstrap interval over users, each seed."""
    files = os.environ.get("NEXTCLICK_SEQUENCES", "")
    if not files:
        print("NEXTCLICK_SEQUENCES names no files: nothing to do")
        return
    for path in map(Path, files.split(":")):
        data = sessions(path)
        manifest = json.loads((data / "manifest.json").read_text())
        print(f"\n{path.stem}: {manifest['counts']['items']:,} items; test, mean [95 % over users] (each seed)")
        print("| model | " + " | ".join(METRICS) + " | the same after a refit on train + valid | |")
        print("|---" * (1 + 2 * len(METRICS)) + "|")
        for name, options in MODELS.items():
            print(line(name, data, options, seeds), flush=True)
        folder = Run("gru4rec", data, (), seeds[0]).folder
        for name, table in read_ranks(folder / "result" / "ranks.parquet").items():
            if name != "model":
                print(f"| {name} | " + " | ".join(cell([table["rank"].to_numpy()], m) for m in METRICS) + " | | |")


def sessions(path: Path) -> Path:
    """The dataset of a sequence file."""
    folder = work() / path.stem
    if not (folder / "data" / "manifest.json").exists():
        folder.mkdir(exist_ok=True)
        convert(path, folder / "log.csv")
        options = (f"input={folder / 'log.csv'}", f"output={folder / 'data'}", "scenario=qb_video", "overwrite=true")
        program("etl", *options, *PROTOCOL)
    return folder / "data"


def line(name: str, data: Path, options: tuple[str, ...], seeds: tuple[int, ...]) -> str:
    """Train with a refit; the model before it is retained, so that one run gives both figures."""
    arguments = (*RECIPE, *options, "train.refit=true")
    runs = [Run(name.replace(" ", "-"), data, arguments, seed, ("mask_seen=true",)) for seed in seeds]
    execute(runs)
    cells = []
    for bundle in ("bundle-selected", "bundle"):
        ranks = [ranks_of(run, data, bundle) for run in runs]
        cells += [cell(ranks, metric) for metric in METRICS]
    return f"| {name} | " + " | ".join(cells) + " |"


def ranks_of(run: Run, data: Path, bundle: str) -> np.ndarray[Any, Any]:
    """Rank of every user's test item by one bundle of a run, by user."""
    result = run.folder / ("result" if bundle == "bundle" else "result-selected")
    if not (result / "metrics.json").exists():
        options = (f"bundle={run.folder / bundle}", f"data={data}", f"output={result}", "overwrite=true")
        program("retrieval", *options, "mask_seen=true", "threads=1", "baselines=[popularity]")
    ranks: np.ndarray[Any, Any] = read_ranks(result / "ranks.parquet")["model"]["rank"].to_numpy()
    return ranks


def cell(ranks: list[np.ndarray[Any, Any]], metric: str) -> str:
    """Mean over users and seeds, the interval over users, each seed's figure."""
    value = np.stack([gains(rank, metric) for rank in ranks])
    low, high = interval(value.mean(0))
    each = f" ({', '.join(number(v) for v in value.mean(1))})" if len(ranks) > 1 else ""
    return f"{number(value.mean())} [{number(low)}, {number(high)}]{each}"


def number(value: float) -> str:
    return f"{value:.4f}".lstrip("0")
