"""A trained model in plain text: parameter counts, gates, an item's neighbours, a session's recommendations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from etl.dataset import TRAIN_HOLDOUT, Dataset
from etl.runtime.errors import InputError
from etl.runtime.object_store import local_path
from trainer.config import TrainerConfig
from trainer.data.reader import Sessions
from trainer.distributed.world import World
from trainer.finished_run import load_selected, open_run
from trainer.program_configs import ShowConfig
from trainer.summary import DIAGNOSTICS, forward_flops
from trainer.task.registry import model_task_of
from trainer.task.sessions import SessionTask
from trainer.training.objective import ITEM
from trainer.training.step import TrainStep


def inspect(options: ShowConfig) -> list[str]:
    """The lines to print.

    Raises:
        InputError: the run is not finished, another dataset, or an unknown item or user.
    """
    config, dataset = open_run(options.run, options.data)
    if not 1 <= options.item <= dataset.manifest.n_items:
        raise InputError(f"item in 1..{dataset.manifest.n_items}", options.item, "choose a dense id of items.parquet")
    model_task = model_task_of(config, dataset, World.alone())
    train_step = model_task.train_step(total_steps=1)
    load_selected(local_path(options.run), train_step)
    model_task.load_score_weights(local_path(options.run), TRAIN_HOLDOUT)
    lines = [*parameter_counts(config, dataset, train_step), "", *gates(local_path(options.run)), ""]
    lines += neighbours(dataset, train_step, options.item, options.k)
    if isinstance(model_task, SessionTask):
        lines += ["", *recommendations(model_task, dataset, train_step, options)]
    return lines


def parameter_counts(config: TrainerConfig, dataset: Dataset, train_step: TrainStep) -> list[str]:
    """Parameters and FLOPs by part of the model."""
    counts = {f"{name} table": table.parameters() for name, table in train_step.tables.items()}
    counts |= train_step.model.part_parameters()
    flops = forward_flops(config, dataset, train_step)
    lines = [f"{'part':<24}{'parameters':>14}{'forward FLOPs an example':>28}"]
    for name in dict.fromkeys([*counts, *flops]):
        if counts.get(name) or flops.get(name):
            lines.append(f"{name:<24}{counts.get(name, 0):>14,}{flops.get(name, 0):>28,}")
    return [*lines, f"{'total':<24}{sum(counts.values()):>14,}{sum(flops.values()):>28,}"]


def gates(run: Path) -> list[str]:
    """Mean gate weights and entropy by task, from the run's validation."""
    try:
        record = json.loads((run / DIAGNOSTICS).read_text())["gates"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{run / DIAGNOSTICS} as training wrote it", repr(error), "train the run again") from None
    if not record:
        return ["no gates"]
    lines = ["mean gate weights on valid; entropy in nats, and as a share of its largest"]
    for task, weights in record["mean_weight"].items():
        entropy, max_entropy = record["entropy_nats"][task], float(np.log(len(weights)))
        shares = " ".join(f"{weight:.2f}" for weight in weights)
        lines.append(f"{task:<8} {shares}   {entropy:.2f}" + (f" ({entropy / max_entropy:.0%})" if max_entropy else ""))
    return lines


def neighbours(dataset: Dataset, train_step: TrainStep, item: int, k: int) -> list[str]:
    """Nearest neighbours of an item by cosine similarity."""
    everything = torch.arange(1, dataset.manifest.n_items + 1)
    vector = train_step.model.item_features.vectors(train_step.tables, ITEM, everything)
    vector = torch.nn.functional.normalize(vector.cpu(), dim=1)
    cosine = vector @ vector[item - 1]
    cosine[item - 1] = -torch.inf
    values, best = best_of(cosine, min(k, len(cosine) - 1))
    lines = [f"nearest to item {describe(dataset, [item])[0]} by cosine"]
    names = describe(dataset, best)
    return lines + [f"  {value:.3f}  {name}" for value, name in zip(values, names, strict=True)]


def best_of(score_C: torch.Tensor, k: int) -> tuple[list[float], list[int]]:
    """The `k` highest scores and their item ids, ties by ascending id; NaN ranks last."""
    value, row = torch.sort(score_C.nan_to_num(-torch.inf, torch.inf, -torch.inf), descending=True, stable=True)
    return value[:k].tolist(), (row[:k] + 1).tolist()


def describe(dataset: Dataset, items: list[int]) -> list[str]:
    """One line per item."""
    rows = dataset.items().take([item - 1 for item in items]).to_pylist()
    return [
        f"{r['item']} (raw {r['item_id']}, category {r['category']}, {r['train_clicks']:,} train clicks)" for r in rows
    ]


def recommendations(model_task: SessionTask, dataset: Dataset, train_step: TrainStep, options: ShowConfig) -> list[str]:
    """A session and the model's next-item recommendations: candidates other than the session's items."""
    session = find_session(model_task, options.user)
    items = session.items.values
    scorer = model_task.scorer(train_step)
    state = scorer.states(session, np.array([[len(items)]]))[:, 0]
    score = (scorer.queries(state) @ scorer.item_vectors().t())[0].cpu()
    if scorer.term is not None:
        term = scorer.term.scores(session, np.array([len(items)]), "next")
        score += torch.from_numpy(term.toarray()[0, 1:].astype(np.float32))
    new = torch.from_numpy(np.setdiff1d(model_task.all_candidates, items))
    score_C = torch.full_like(score, -torch.inf)
    score_C[new - 1] = score[new - 1]
    values, best = best_of(score_C, min(options.k, len(new)))
    lines = [f"session of user {session.user_id[0]}, {len(items)} clicks, the last ones"]
    lines += [f"  {name}" for name in describe(dataset, items[-5:].tolist())]
    lines += ["next by score"]
    names = describe(dataset, best)
    return lines + [f"  {value:7.3f}  {name}" for value, name in zip(values, names, strict=True)]


def find_session(model_task: SessionTask, user: int | None) -> Sessions:
    """The session of a user, or the dataset's first.

    Raises:
        InputError: the user has no session.
    """
    reader = model_task.reader(TRAIN_HOLDOUT)
    for group in range(len(reader.groups)):
        users = reader.read_columns([group], ["user_id"])["user_id"].to_numpy()
        row = np.flatnonzero(users == user) if user is not None else np.arange(min(len(users), 1))
        if len(row):
            return reader.read(np.array([group])).take(row)
    raise InputError("a user with a session", user, "choose a raw user id of the dataset")
