"""Quality on real input over several seeds, by the programs' command lines."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

METRICS = ("hr@10", "ndcg@10", "hr@20", "ndcg@20")


def movielens(seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Test HR and NDCG of `gru4rec` and `hybrid` on MovieLens-100K compared with popularity."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program("etl.movielens", f"output={folder / 'ml.csv'}")
        program("etl", f"input={folder / 'ml.csv'}", f"output={folder / 'data'}", "scenario=qb_video")
        print(f"{'test':<12}" + "".join(f"{m:>20}" for m in METRICS) + "   × popularity (hr@10)")
        popular = None
        for model in ("gru4rec", "hybrid"):
            actual = [one_run(folder, model, seed) for seed in seeds]
            popular = actual[0]["baselines"]["popularity"]["test"]
            values = np.array([[result["test"][m] for m in METRICS] for result in actual])
            cells = "".join(f"{m:>12.4f} ±{s:.4f}" for m, s in zip(values.mean(0), values.std(0, ddof=1), strict=True))
            ratios = " ".join(f"{v:.2f}" for v in values[:, 0] / popular["hr@10"])
            print(f"{model:<12}{cells}   {ratios}", flush=True)
        print(f"{'popularity':<12}" + "".join(f"{popular[m]:>12.4f}        " for m in METRICS))


def one_run(folder: Path, model: str, seed: int) -> dict:
    run, result = folder / f"{model}-{seed}", folder / f"{model}-{seed}-result"
    program("trainer", f"data={folder / 'data'}", f"output={run}", f"model={model}", f"seed={seed}")
    program("retrieval", f"bundle={run / 'bundle'}", f"data={folder / 'data'}", f"output={result}")
    return json.loads((result / "metrics.json").read_text())


def program(name: str, *options: str) -> None:
    subprocess.run([sys.executable, "-m", name, *options], check=True, capture_output=True)
