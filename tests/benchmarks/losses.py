"""Comparison of next-item losses: `gru4rec` on logs of different kinds, judged by valid NDCG@20 only.

Each loss has its best known settings, the rest is `recipe=small`. Logs are MovieLens-100K, the files in
`NEXTCLICK_SEQUENCES` and the logs in the `qb_video` format in `NEXTCLICK_LOGS`, separated by `:`; of the
latter the first `NEXTCLICK_USERS` users (default: all). The candidates of `recipe=auto` were selected by this table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from tests.benchmarks.ablation import log_sessions
from tests.benchmarks.models import Run, execute, movielens
from tests.benchmarks.sequences import sessions

DROPOUT = ("network.embedding_dropout=0.5", "network.state_dropout=0.5")
COSINE = "network.cosine_temperature=0.08"
POPULAR = "train.negative_popularity_exponent=0.4"
LOSSES: Mapping[str, tuple[str, ...]] = {
    "BPR-max": (),
    "BPR-max, dropout .5": DROPOUT,
    "sampled softmax, logQ": ("loss=sampled_softmax", POPULAR, "network.embedding_dropout=0.35"),
    "sampled softmax, logQ, cosine": ("loss=sampled_softmax", POPULAR, COSINE),
    "sampled softmax, logQ, cosine, dropout .5": ("loss=sampled_softmax", POPULAR, COSINE, *DROPOUT),
    "full softmax": ("loss=softmax", *DROPOUT),
    "full softmax, cosine": ("loss=softmax", COSINE, *DROPOUT),
    "gBCE": ("loss=gbce", *DROPOUT),
}
"""Options after `recipe=small model=gru4rec`; dropout and exponent of sampled softmax as by GRU4Rec's authors."""
FEW_EPOCHS = ("train.epochs=8", "train.early_stopping_patience=2")
"""For logs of more than `MANY_CLICKS` clicks."""
MANY_CLICKS = 100_000


def losses() -> None:
    """One line per loss: the best epoch's valid NDCG@20 on each log with its rank there, and the worst rank."""
    sequence, logs = (filter(None, os.environ.get(f"NEXTCLICK_{n}", "").split(":")) for n in ("SEQUENCES", "LOGS"))
    data = {"MovieLens-100K": movielens()} | {path.stem: sessions(path) for path in map(Path, sequence)}
    users = os.environ.get("NEXTCLICK_USERS")
    first = (f"protocol.first_users={users}",) if users else ()
    data |= {path.name.split(".")[0]: log_sessions(path, *first) for path in map(Path, logs)}
    found: dict[str, dict[str, float]] = {name: {} for name in LOSSES}
    for log, folder in data.items():
        many = json.loads((folder / "manifest.json").read_text())["counts"]["clicks"] > MANY_CLICKS
        for name, options in LOSSES.items():
            arguments = ("model=gru4rec", "recipe=small", *(FEW_EPOCHS if many else ()), *options)
            run = Run(f"loss-{name.replace(' ', '-').replace(',', '')}", folder, arguments)
            execute([run], search=False)
            summary = json.loads((run.folder / "summary.json").read_text())
            found[name][log] = summary["valid"]["ndcg@20"]
    print("\n".join(table(found)))


def table(value: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines of a table of values by loss and log, with their ranks; larger values are better.

    >>> print("\\n".join(table({"a": {"x": 0.2, "y": 0.1}, "b": {"x": 0.3, "y": 0.05}})))
    | loss | x | y | worst rank |
    |---|---|---|---|
    | a | 0.2000 (2) | 0.1000 (1) | 2 |
    | b | 0.3000 (1) | 0.0500 (2) | 2 |
    """
    logs = list(dict.fromkeys(log for row in value.values() for log in row))
    lines = [f"| loss | {' | '.join(logs)} | worst rank |", "|---" * (len(logs) + 2) + "|"]
    for name, row in value.items():
        rank = {log: 1 + sum(other.get(log, 0.0) > row[log] for other in value.values()) for log in row}
        cells = [f"{row[log]:.4f} ({rank[log]})" if log in row else "–" for log in logs]
        lines.append(f"| {name} | {' | '.join(cells)} | {max(rank.values())} |")
    return lines
