"""Comparison with the official GRU4Rec: training rate on the same events, one core, by CPU time; and quality.

`NEXTCLICK_OFFICIAL` is a checkout of `hidasib/GRU4Rec_PyTorch_Official`, `NEXTCLICK_SEQUENCES` a file of sequences
(see `tests.benchmarks.sequences`). Cross-entropy at its official settings: 100 units, 2,048 negatives.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from retrieval.metrics.significance import gains
from retrieval.ranks_file import read_ranks
from tests.benchmarks.models import program
from tests.benchmarks.sequences import METRICS, sessions

ROUNDS, ROUND_EPOCHS, EPOCHS = 3, 1, 10
"""Rates are of short alternating runs; quality is of one long run each."""
OURS = (
    "model=gru4rec",
    "recipe=small",
    "loss=sampled_softmax",
    "network.embedding_dim=100",
    "network.hidden_size=100",
    "network.embedding_dropout=0.35",
    "network.state_dropout=0.2",
    "train.learning_rate=0.06",
    "train.negative_popularity_exponent=0.4",
    "train.negatives=2048",
    "train.batch_tokens=512",
    "ray.workers=0",
)
THEIRS = {
    "loss": "cross-entropy",
    "constrained_embedding": True,
    "embedding": 0,
    "layers": [100],
    "batch_size": 48,
    "dropout_p_embed": 0.35,
    "dropout_p_hidden": 0.2,
    "learning_rate": 0.06,
    "momentum": 0.0,
    "n_sample": 2048,
    "sample_alpha": 0.4,
    "bpreg": 0.0,
    "elu_param": 0.0,
    "logq": 1.0,
}
KEPT = 50
"""Retained clicks of a sequence, as in the sequences' protocol."""


def official() -> None:
    """Alternating rates of both, their ratio, and test quality of both with seen items masked."""
    checkout, files = (os.environ.get(f"NEXTCLICK_{name}", "") for name in ("OFFICIAL", "SEQUENCES"))
    if not (checkout and files):
        print("NEXTCLICK_OFFICIAL=CHECKOUT and NEXTCLICK_SEQUENCES=FILE name no code or no file: nothing to do")
        return
    path = Path(files.split(":")[0])
    data = sessions(path)
    with tempfile.TemporaryDirectory() as name:
        in_turn(checkout, path, data, Path(name))
        theirs = run_theirs(checkout, path, EPOCHS, Path(name))
        run_ours(data, Path(name) / "run", EPOCHS)
        bundle, result = Path(name) / "run" / "bundle", Path(name) / "result"
        options = (f"bundle={bundle}", f"data={data}", f"output={result}", "mask_seen=true", "baselines=[popularity]")
        program("retrieval", *options)
        ranks = read_ranks(result / "ranks.parquet")["model"]["rank"].to_numpy()
        for label, actual in (("ours", ranks), ("official", np.array(theirs["ranks"]))):
            print(label, "  ".join(f"{metric} {gains(actual, metric).mean():.4f}" for metric in METRICS), flush=True)


def in_turn(checkout: str, sequences: Path, data: Path, folder: Path) -> None:
    """Events per second of CPU time of both, alternating several times."""
    ratios = []
    for number in range(ROUNDS):
        actual = run_theirs(checkout, sequences, ROUND_EPOCHS, folder)
        theirs = actual["events"] * ROUND_EPOCHS / actual["seconds"]
        # The cost of an epoch is what it adds to a run: no start-up or export, but its validation and checkpoint.
        first, more = (run_ours(data, folder / f"{number}-{n}", n) for n in (1, 1 + ROUND_EPOCHS))
        ours = actual["events"] * ROUND_EPOCHS / (more - first)
        ratios.append(ours / theirs)
        print(f"events/s: ours {ours:,.0f}, official {theirs:,.0f}: {ours / theirs:.2f} ×", flush=True)
    print(f"median ratio {np.median(ratios):.2f} × (wanted 3)", flush=True)


def run_ours(data: Path, run: Path, epochs: int) -> float:
    """Train on one core and return the seconds of CPU time."""
    before = children_seconds()
    program(
        "trainer",
        f"data={data}",
        f"output={run}",
        *OURS,
        f"train.epochs={epochs}",
        f"train.early_stopping_patience={epochs}",
    )
    return children_seconds() - before


def children_seconds() -> float:
    """CPU time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_theirs(checkout: str, sequences: Path, epochs: int, folder: Path) -> dict:
    """Train the official code on one core: events per epoch, seconds of CPU time, ranks of the test items."""
    source, out = folder / "official", folder / "official.json"
    if not source.exists():
        shutil.copytree(checkout, source, ignore=shutil.ignore_patterns(".git"))
        module = source / "gru4rec_pytorch.py"
        # Current pandas passes torch a Series here, which torch indexes by label.
        text = module.read_text().replace("itemidmap.index.values], dtype", "itemidmap.index.values].values, dtype")
        module.write_text(text)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '.')}"}
    command = [sys.executable, "-m", "tests.benchmarks.official", str(sequences), str(epochs), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-800:])
    actual: dict = json.loads(out.read_text())
    return actual


def train_theirs(sequences: Path, epochs: int, out: Path) -> None:
    """In a subprocess: train on all but the last two items, rank the last."""
    import pandas as pd
    import torch
    from gru4rec_pytorch import GRU4Rec  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    clicks = [[int(word) for word in line.split()[1:]][-KEPT:] for line in sequences.read_text().splitlines()]
    rows = [(user, item, time) for user, items in enumerate(clicks) for time, item in enumerate(items[:-2])]
    frame = pd.DataFrame(rows, columns=["SessionId", "ItemId", "Time"])
    frame["Time"] += frame["SessionId"] * 2 * KEPT
    model = GRU4Rec(device=torch.device("cpu"))
    model.set_params(**THEIRS, n_epochs=epochs)
    begin = time.process_time()
    model.fit(frame, compatibility_mode=False, sample_cache_max_size=1_000_000)
    seconds = time.process_time() - begin
    ranks = [rank_of(model, items) for items in clicks] if epochs == EPOCHS else []
    out.write_text(json.dumps({"events": len(rows) - len(clicks), "seconds": seconds, "ranks": ranks}))


def rank_of(model, items: list[int]) -> int:
    """Rank of a sequence's last item given all others, seen items masked; a miss counts as the last rank."""
    import torch

    number = model.data_iterator.itemidmap
    seen = [int(number[item]) for item in items[:-1] if item in number.index]
    if items[-1] not in number.index or not seen or items[-1] in items[:-1]:
        return 10**9
    hidden = [torch.zeros(1, units) for units in model.layers]
    with torch.no_grad():
        for item in seen:
            score = model.model.forward(torch.tensor([item]), hidden, None, training=False)[0]
    target = int(number[items[-1]])
    own = score[target].item()
    score[seen] = -torch.inf
    return int((score >= own).sum())


if __name__ == "__main__":
    train_theirs(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
