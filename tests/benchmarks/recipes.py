"""The search behind `recipe=small`: changes of the session models, judged by valid NDCG@20 only.

Data are MovieLens-100K and the files in `NEXTCLICK_SEQUENCES`; a change is accepted if it helps on both, or on
one without harm to the other. The recipes in `trainer/conf/recipes` and the figures in RESULTS.md come from here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from tests.benchmarks.models import Run, execute, movielens
from tests.benchmarks.sequences import sessions

BEFORE = (
    "loss=sampled_softmax",
    "network.embedding_dim=64",
    "network.hidden_size=64",
    "train.network_learning_rate=null",
    "train.ppmi_start=0",
)
"""Options of all session models before the search; changes come later and override them."""
PAIRWISE, SLOW = "loss=bpr_max", "train.network_learning_rate=0.01"
WIDE = ("network.embedding_dim=128", "network.hidden_size=128")
START = "train.ppmi_start=0.5"
ATTENTION = (
    "train.network_learning_rate=0.001",
    "train.learning_rate=0.05",
    "train.batch_tokens=256",
    "train.negative_popularity_exponent=null",
    "network.layers=2",
    "network.embedding_dropout=0.2",
    "network.state_dropout=0.2",
)
"""Options of sasrec until 2026-11-26."""
SLOWLY = (
    "train.network_learning_rate=0.001",
    *WIDE,
    "loss=sampled_softmax",
    "train.learning_rate=0.01",
    "train.ppmi_start=1",
)
"""Options of sasrec since then: with those of its recipe, uniform negatives, one layer and dropout 0.5."""
CANDIDATES: dict[str, dict[str, tuple[str, ...]]] = {
    "gru4rec": {
        "before": (),
        "BPR-max": (PAIRWISE,),
        "BPR-max, 128": (PAIRWISE, *WIDE),
        "BPR-max, 128, embedding dropout .35": (PAIRWISE, *WIDE, "network.embedding_dropout=0.35"),
        "BPR-max, 128, network rate .01": (PAIRWISE, *WIDE, SLOW),
        "BPR-max, 128, PPMI start": (PAIRWISE, *WIDE, START),
    },
    "hybrid": {
        "before": (),
        "plain experts": ("network.residual=false",),
        "network rate .01": (SLOW,),
        "BPR-max": (PAIRWISE,),
        "BPR-max, network rate .01": (PAIRWISE, SLOW),
        "BPR-max, 128": (PAIRWISE, *WIDE),
        "BPR-max, 128, network rate .01": (PAIRWISE, *WIDE, SLOW),
        "BPR-max, 128, network rate .01, PPMI start": (PAIRWISE, *WIDE, SLOW, START),
    },
    "srgnn": {
        "network rate .01": ("train.prefixes=8", SLOW),
        "BPR-max, network rate .01": ("train.prefixes=8", PAIRWISE, SLOW),
    },
    "sasrec": {
        "before": ATTENTION,
        "BPR-max": (*ATTENTION, PAIRWISE),
        "BPR-max, PPMI start": (*ATTENTION, PAIRWISE, START),
        "sampled softmax, uniform negatives, 128, PPMI start of length 1, rate .01": SLOWLY,
        "the same without the start": (*SLOWLY, "train.ppmi_start=0"),
        "the same with a cosine, temperature .08": (*SLOWLY, "network.cosine_temperature=0.08"),
    },
}


def recipes(seeds: tuple[int, ...] = (0, 1)) -> None:
    """One table per dataset: the best valid NDCG@20 of every change, by seed."""
    files = [Path(name) for name in os.environ.get("NEXTCLICK_SEQUENCES", "").split(":") if name]
    for title, data in {"MovieLens-100K": movielens(), **{path.stem: sessions(path) for path in files}}.items():
        print(f"\n{title}: valid NDCG@20 of the best epoch, mean (by seed)")
        print("| model | change | valid NDCG@20 | best epoch |\n|---|---|---|---|")
        for model, changes in CANDIDATES.items():
            for change, options in changes.items():
                arguments = ("recipe=small", f"model={model}", *BEFORE, *options, "train.valid_sessions=100000")
                runs = [Run(f"search-{model}-{change.replace(' ', '-')}", data, arguments, seed) for seed in seeds]
                execute(runs, search=False)
                actual = [json.loads((run.folder / "summary.json").read_text()) for run in runs]
                value = [summary["valid"]["ndcg@20"] for summary in actual]
                each = f"{np.mean(value):.4f} ({', '.join(f'{v:.4f}' for v in value)})"
                print(f"| {model} | {change} | {each} | {actual[0]['best_epoch']} |", flush=True)
