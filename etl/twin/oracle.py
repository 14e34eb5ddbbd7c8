"""How good a model could be: expected scores of the exact distribution under `protocol=study`.

The oracle knows the process and every click of a user since the first, not the hidden taste. A model that
sees the last thirty clicks knows less, so these figures bound what any model can reach.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from etl.protocol import Int
from etl.twin.generate import Clicks, Twin, rows_of, simulate
from etl.twin.process import (
    AFFINITY,
    CATEGORIES,
    COPY_SHARE,
    SKIPPED_STEEPNESS,
    TASKS,
    TASTES,
    THREAD,
    Float,
    Process,
    rank_probability,
)
from etl.twin.published import PUBLISHED

CUTOFFS = (5, 10, 20)
MIN_CLICKS = 10
USERS = 10_000
"""Users that the expectation is averaged over (all, in a smaller twin)."""
USERS_AT_ONCE = 500


def truth(twin: Twin) -> dict[str, Any]:
    """The expected best test scores: `hr@k`, `ndcg@k`, `mrr@k`, and `auc/<task>` by simulation.

    HR, NDCG and MRR are exact expectations given each test user's history; the AUCs rank the labels that
    were drawn by their exact probabilities.
    """
    clicks = simulate(twin, 0)
    users = np.flatnonzero(np.diff(clicks.offset) >= MIN_CLICKS)[:USERS]
    sums = dict.fromkeys(expected_ranking(np.zeros((0, max(CUTOFFS)))), 0.0)
    rows: list[dict[str, Any]] = []
    table = rows_of(twin, 0)
    for begin in range(0, len(users), USERS_AT_ONCE):
        part = users[begin : begin + USERS_AT_ONCE]
        belief, recent = beliefs(twin.process, clicks, part)
        for name, value in expected_ranking(best_probabilities(twin.process, belief, recent)).items():
            sums[name] += value
        rows.append(score_rows(twin, clicks, table, part, belief, recent))
    return {
        "scenario": twin.scenario,
        "users": twin.users,
        "items": twin.process.items,
        "seed": twin.process.seed,
        "task_correlation": twin.process.task_correlation,
        "protocol": "study",
        "test_users": len(users),
        "test": {**{name: value / max(len(users), 1) for name, value in sums.items()}, **feedback_auc(twin, rows)},
    }


def beliefs(process: Process, clicks: Clicks, users: Int) -> tuple[Float, Int]:
    """What the clicks of users before their last one say.

    Args:
        process: of the twin.
        clicks: of a chunk.
        users: numbers of users with at least two clicks.

    Returns:
        Probabilities of the tastes `[U, TASTES]`, and the last two visible clicks `[U, 2]` (-1 = none),
        the latest first.
    """
    length = np.diff(clicks.offset)[users] - 1
    log_belief = np.zeros((len(users), TASTES))
    recent = np.full((len(users), 2), -1, np.int64)
    for step in range(int(length.max(initial=0))):
        at = np.flatnonzero(step < length)
        item = clicks.rank[clicks.offset[users[at]] + step]
        log_belief[at] += np.log(process.likelihood(item, recent[at, 0], recent[at, 1]))
        recent[at, 1], recent[at, 0] = recent[at, 0], item
    belief = np.exp(log_belief - log_belief.max(axis=1, keepdims=True))
    return belief / belief.sum(axis=1, keepdims=True), recent


def best_probabilities(process: Process, belief_UZ: Float, recent_U2: Int) -> Float:
    """Probabilities of the 20 most probable next items of each user, falling, `[U, 20]`.

    An item that is neither the last click nor a successor can only be among them if it is among the 20
    most popular of its category: inside a category probability falls with rank.
    """
    top = min(max(CUTOFFS), process.items // CATEGORIES)
    popular = (np.arange(top)[:, None] * CATEGORIES + np.arange(CATEGORIES)).ravel()
    last, before = recent_U2.T
    special = [last[:, None], *(process.successors(np.maximum(s, 0), o) for s, o in ((last, 1), (before, 2)))]
    item = np.concatenate([*special, np.broadcast_to(popular, (len(last), len(popular)))], axis=1)
    thread, broad, inside = process.parts(item, last, before)
    probability = thread + broad + inside * np.take_along_axis(belief_UZ @ AFFINITY, item % CATEGORIES, axis=1)
    # The special items may be popular ones, or each other: each counts once.
    order = np.argsort(item, axis=1, kind="stable")
    ordered = np.take_along_axis(item, order, axis=1)
    again = np.concatenate([np.zeros((len(item), 1), bool), ordered[:, 1:] == ordered[:, :-1]], axis=1)
    probability = np.where(again, 0.0, np.take_along_axis(probability, order, axis=1))
    return -np.sort(-probability, axis=1)[:, : max(CUTOFFS)]


def expected_ranking(best_UK: Float) -> dict[str, float]:
    """Sums over users of expected HR, NDCG and MRR when items are ranked by their probability."""
    rank = np.arange(1, best_UK.shape[1] + 1)
    worth = {"hr": np.ones(len(rank)), "ndcg": 1 / np.log2(rank + 1), "mrr": 1 / rank}
    return {f"{name}@{k}": float((best_UK[:, :k] * value[:k]).sum()) for name, value in worth.items() for k in CUTOFFS}


def score_rows(
    twin: Twin, clicks: Clicks, table: dict[str, Any], users: Int, belief_UZ: Float, recent_U2: Int
) -> dict[str, Any]:
    """Exact scores of the rows of users' test blocks, and their labels.

    A row of a block is the click with odds p(item | history) : s × q(item), where s rows of items drawn
    from q are shown unclicked before a click. Given a click, an action's probability is averaged over
    tastes and over whether the click followed the thread, as the history and the item leave them open.
    """
    process = twin.process
    through = np.cumsum(table["click"], dtype=np.int64) - table["click"]  # clicks before the row, over all users
    in_block = through == (clicks.offset[1:] - 1)[table["user"]]
    slot = np.full(len(clicks.taste), -1)
    slot[users] = np.arange(len(users))
    at = np.flatnonzero(in_block & (slot[table["user"]] >= 0))
    user, item = slot[table["user"][at]], table["rank"][at]
    last, before = recent_U2[user].T
    thread, broad, inside = (part[:, 0] for part in process.parts(item[:, None], last, before))
    copies = COPY_SHARE * (item == last)
    by_taste = (thread + broad)[:, None] + inside[:, None] * AFFINITY[:, item % CATEGORIES].T
    joint = belief_UZ[user] * by_taste  # p(taste, item | history)
    clicked = joint.sum(axis=1)
    shown = (1 - twin.conflict_share) * rank_probability(item, process.items, SKIPPED_STEEPNESS)
    shown = shown + twin.conflict_share * (item == last)
    scores = {"click": clicked / (clicked + twin.skips_per_click * shown)}
    followed = (thread - copies) / np.maximum(by_taste.T, 1e-300)  # p(thread | taste, item, history)
    for task in actions(twin):
        chance = np.zeros(len(item))
        for taste in range(TASTES):
            logit = process.logits(task, item, np.full(len(item), taste), np.zeros(len(item)))
            no, yes = (1 / (1 + np.exp(-logit - extra)) for extra in (0.0, THREAD))
            chance += joint[:, taste] / clicked * (no + followed[taste] * (yes - no))
        scores[task] = chance
    labels = {name: table[name][at] for name in scores}
    return {"scores": scores, "labels": labels, "clicked": table["click"][at] == 1}


def actions(twin: Twin) -> list[str]:
    """Feedback tasks that the log has."""
    return [task for task in TASKS if PUBLISHED[twin.scenario].rate(task) > 0]


def feedback_auc(twin: Twin, parts: list[dict[str, Any]]) -> dict[str, float | None]:
    """AUC of the exact probabilities on drawn labels: all rows, and `_given_click`."""
    out: dict[str, float | None] = {}
    clicked = np.concatenate([part["clicked"] for part in parts]) if parts else np.zeros(0, bool)
    for task in ("click", *actions(twin)) if parts else ():
        label = np.concatenate([part["labels"][task] for part in parts])
        score = np.concatenate([part["scores"][task] for part in parts])
        given_click = score[clicked]
        if task != "click":
            score = score * np.concatenate([part["scores"]["click"] for part in parts])
        out[f"auc/{task}"] = _auc(label, score)
        out[f"auc/{task}_given_click"] = _auc(label[clicked], given_click)
    return out


def _auc(label: Any, score: Float) -> float | None:
    """Area under the ROC curve by ranks; equal scores share their mean rank."""
    positives = int(label.sum())
    if positives in (0, len(label)):
        return None
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    rank_sum = float(mean_rank[inverse][label == 1].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * (len(label) - positives))
