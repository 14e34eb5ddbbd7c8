"""Oracle scores: expected metrics of the exact distribution under `protocol=study`.

The oracle knows the process and all clicks of a user, but not the hidden taste. A model that sees only the
last thirty clicks knows less, so these scores are an upper bound for any model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from etl.runtime.arrays import FloatArray, IntArray
from etl.twin.process import AFFINITY, COPY_SHARE, TASTES, TOPICS, UNCLICKED_STEEPNESS, Process, rank_probability
from etl.twin.rows import LATE, actions, chance_of, conflict_share, rows_of, skips_per_click
from etl.twin.simulate import Clicks, Twin, simulate

CUTOFFS = (5, 10, 20)
MIN_CLICKS = 10
USERS = 10_000
"""Maximum number of users that the expectation is averaged over."""
USERS_AT_ONCE = 500


def truth(twin: Twin) -> dict[str, Any]:
    """The expected best test scores: `hr@k`, `ndcg@k`, `mrr@k`, and `auc/<task>` by simulation.

    HR, NDCG and MRR are exact expectations given each test user's history; the AUCs rank sampled labels
    by their exact probabilities, over the rows up to the test click and after it.
    """
    clicks = simulate(twin, 0)
    users = np.flatnonzero(np.diff(clicks.offset) >= MIN_CLICKS)[:USERS]
    totals = dict.fromkeys(expected_ranking(np.zeros((0, max(CUTOFFS)))), 0.0)
    rows: list[dict[str, Any]] = []
    table = rows_of(twin, 0, clicks)
    for begin in range(0, len(users), USERS_AT_ONCE):
        part = users[begin : begin + USERS_AT_ONCE]
        belief, recent = beliefs(twin.process, clicks, part)
        for name, value in expected_ranking(best_probabilities(twin.process, belief, recent)).items():
            totals[name] += value
        rows += [score_rows(twin, clicks, table, part, held_out) for held_out in (1, 0)]
    return {
        "scenario": twin.scenario,
        "users": twin.users,
        "items": twin.process.items,
        "seed": twin.process.seed,
        "task_correlation": twin.process.task_correlation,
        "successor_smoothness": twin.process.smoothness,
        "observed_topics": twin.observed_topics,
        "protocol": "study",
        "test_users": len(users),
        "test": {**{name: value / max(len(users), 1) for name, value in totals.items()}, **feedback_auc(twin, rows)},
    }


def beliefs(process: Process, clicks: Clicks, users: IntArray, held_out: int = 1) -> tuple[FloatArray, IntArray]:
    """Posterior over users' tastes given their clicks without the last `held_out`.

    Args:
        process: process of the twin.
        clicks: clicks of a chunk.
        users: indices of users with more than `held_out` clicks.
        held_out: number of last clicks that are hidden.

    Returns:
        Probabilities of the tastes `[U, TASTES]`, and the last two visible clicks `[U, 2]` (-1 = none),
        the latest first.
    """
    length = np.diff(clicks.offset)[users] - held_out
    log_belief = np.zeros((len(users), TASTES))
    recent = np.full((len(users), 2), -1, np.int64)
    for step in range(int(length.max(initial=0))):
        at = np.flatnonzero(step < length)
        item = clicks.rank[clicks.offset[users[at]] + step]
        log_belief[at] += np.log(process.likelihood(item, recent[at, 0], recent[at, 1]))
        recent[at, 1], recent[at, 0] = recent[at, 0], item
    belief = np.exp(log_belief - log_belief.max(axis=1, keepdims=True))
    return belief / belief.sum(axis=1, keepdims=True), recent


def best_probabilities(process: Process, belief_UZ: FloatArray, recent_U2: IntArray) -> FloatArray:
    """Probabilities of the 20 most probable next items of each user, descending, `[U, 20]`.

    Probability falls with rank within a neighbourhood and within a topic: an item that is neither the last click nor a
    successor can only be among them if it is one of the 20 most popular of a topic, or of the neighbourhood of one of
    the last two clicks.
    """
    top = min(max(CUTOFFS), process.items // TOPICS)
    popular = (np.arange(top)[:, None] * TOPICS + np.arange(TOPICS)).ravel()
    last, before = recent_U2.T
    special = [last[:, None]]
    for source, number in ((np.maximum(last, 0), 1), (np.maximum(before, 0), 2)):
        first, size = process.neighbourhood(source)
        member = np.minimum(np.arange(max(CUTOFFS)), size[:, None] - 1)
        special += [process.successors(source, number), first[:, None] + member * TOPICS * process.neighbourhoods]
    item = np.concatenate([*special, np.broadcast_to(popular, (len(last), len(popular)))], axis=1)
    thread, broad, inside = process.components(item, last, before)
    probability = thread + broad + inside * np.take_along_axis(belief_UZ @ AFFINITY, item % TOPICS, axis=1)
    # The special items may coincide with popular ones or each other: count each once.
    order = np.argsort(item, axis=1, kind="stable")
    ordered = np.take_along_axis(item, order, axis=1)
    again = np.concatenate([np.zeros((len(item), 1), bool), ordered[:, 1:] == ordered[:, :-1]], axis=1)
    probability = np.where(again, 0.0, np.take_along_axis(probability, order, axis=1))
    return -np.sort(-probability, axis=1)[:, : max(CUTOFFS)]


def expected_ranking(best_UK: FloatArray) -> dict[str, float]:
    """Sums over users of expected HR, NDCG and MRR if items are ranked by probability."""
    rank = np.arange(1, best_UK.shape[1] + 1)
    gains = {"hr": np.ones(len(rank)), "ndcg": 1 / np.log2(rank + 1), "mrr": 1 / rank}
    return {f"{name}@{k}": float((best_UK[:, :k] * value[:k]).sum()) for name, value in gains.items() for k in CUTOFFS}


def score_rows(twin: Twin, clicks: Clicks, table: dict[str, Any], users: IntArray, held_out: int) -> dict[str, Any]:
    """Exact scores and labels of the rows shown to users after their clicks without the last `held_out`.

    A row is a click with odds p(item | history) : s × q(item), where s unclicked rows with items drawn from q are shown
    before a click; s is that at a user's end, since a history does not tell how near its end is. Given a click, an
    action's probability is averaged over the posterior of taste and of whether the click followed the last ones;
    without a click over the posterior of taste.

    Returns:
        `scores`: float64 `[R]` for `click`, `<task>` (given a click) and `<task>/unclicked`; `labels`: int8 `[R]` for
        `click` and each task; `clicked`: bool `[R]`; `row`: int64 `[R]`, row numbers in `table`.
    """
    process = twin.process
    belief_UZ, recent_U2 = beliefs(process, clicks, users, held_out)
    slot = np.full(len(clicks.taste), -1)
    slot[users] = np.arange(len(users))
    length = np.diff(clicks.offset)
    at = np.flatnonzero((table["position"] == (length - held_out)[table["user"]]) & (slot[table["user"]] >= 0))
    user, item = slot[table["user"][at]], table["rank"][at]
    last, before = recent_U2[user].T
    thread, broad, inside = (part[:, 0] for part in process.components(item[:, None], last, before))
    copies = COPY_SHARE * (item == last)
    by_taste = (thread + broad)[:, None] + inside[:, None] * AFFINITY[:, item % TOPICS].T
    joint = belief_UZ[user] * by_taste  # p(taste, item | history)
    clicked = joint.sum(axis=1)
    conflicts = conflict_share(twin)
    shown = (1 - conflicts) * rank_probability(item, process.items, UNCLICKED_STEEPNESS) + conflicts * (item == last)
    scores = {"click": clicked / (clicked + LATE * skips_per_click(twin) * shown)}
    followed = (thread - copies) / np.maximum(by_taste.T, 1e-300)  # p(thread | taste, item, history)
    for task in actions(twin):
        chance, otherwise = np.zeros(len(item)), np.zeros(len(item))
        for taste in range(TASTES):
            tastes = np.full(len(item), taste)
            no, yes = (chance_of(twin, task, item, tastes, np.full(len(item), bit)) for bit in (0, 1))
            chance += joint[:, taste] / clicked * (no + followed[taste] * (yes - no))
            otherwise += belief_UZ[user, taste] * chance_of(twin, task, item, tastes, None)
        scores[task], scores[f"{task}/unclicked"] = chance, otherwise
    labels = {name: table[name][at] for name in ("click", *actions(twin))}
    return {"scores": scores, "labels": labels, "clicked": table["click"][at] == 1, "row": at}


def all_rows_score(scores: dict[str, FloatArray], task: str) -> FloatArray:
    """Probability of an action on rows, marginalised over whether they are clicked."""
    return scores["click"] * scores[task] + (1 - scores["click"]) * scores[f"{task}/unclicked"]


def feedback_auc(twin: Twin, tables: list[dict[str, Any]]) -> dict[str, float | None]:
    """AUC of the exact probabilities on sampled labels: all rows, `_given_click` and `_given_no_click`."""
    if not tables:
        return {}
    clicked = np.concatenate([part["clicked"] for part in tables])

    def joined(kind: str, name: str) -> Any:
        return np.concatenate([part[kind][name] for part in tables])

    scores = {name: joined("scores", name) for name in tables[0]["scores"]}
    out: dict[str, float | None] = {"auc/click": _auc(joined("labels", "click"), scores["click"])}
    for task in actions(twin):
        label = joined("labels", task)
        out[f"auc/{task}"] = _auc(label, all_rows_score(scores, task))
        out[f"auc/{task}_given_click"] = _auc(label[clicked], scores[task][clicked])
        out[f"auc/{task}_given_no_click"] = _auc(label[~clicked], scores[f"{task}/unclicked"][~clicked])
    return out


def _auc(label: Any, score: FloatArray) -> float | None:
    """Area under the ROC curve by ranks; ties get the mean rank."""
    positives = int(label.sum())
    if positives in (0, len(label)):
        return None
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    rank_sum = float(mean_rank[inverse][label == 1].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * (len(label) - positives))
