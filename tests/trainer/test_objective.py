"""The objective's losses over drawn, hard and skipped negatives, one by one, and labels of feedback."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.trainer.test_step import config, make_stepper
from trainer.data.batch import BatchOptions, train_batch
from trainer.data.ranking_rows import RankBatch
from trainer.data.reader import SessionReader
from trainer.distributed.world import World
from trainer.training.objective import ITEM

NEGATIVES, REGULARISATION, T = 40, 0.7, 0.6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loss_by_hand(name: str, own: float, score: np.ndarray, n_items: int) -> float:
    """One example's loss by the papers' formulas; `score` of its negatives."""
    if name == "sampled_softmax":
        return float(np.log(np.exp(own) + np.exp(score).sum()) - own)
    if name == "bpr":
        return float(np.mean(np.log1p(np.exp(score - own))))
    if name == "bpr_max":
        share = np.exp(score) / np.exp(score).sum()
        return float(REGULARISATION * share @ score**2 - np.log(share @ sigmoid(own - score)))
    rate = NEGATIVES / (n_items - 1)
    beta = rate * (T * (1 - 1 / rate) + 1 / rate)
    return float((-beta * np.log(sigmoid(own)) - np.log(1 - sigmoid(score)).sum()) / (len(score) + 1))


@pytest.mark.parametrize(("skipped", "hard"), [(0, 0), (2, 0), (2, 5)])
@pytest.mark.parametrize("loss", ["sampled_softmax", "bpr", "bpr_max", "gbce"])
def test_drawn_hard_and_skipped_negatives_of_each_target_are_those_of_a_loop(fifty, loss, skipped, hard):
    """Each draw counts, also of an item drawn before; the target is no negative of its own, drawn or skipped."""
    train = {"negatives": NEGATIVES, "skipped_negatives": skipped, "hard_negatives": hard, "gbce_t": T}
    train |= {"bpr_max_regularisation": REGULARISATION, "logq": 1.0}
    step = make_stepper(config(fifty.path, loss=loss, tasks=["next"], train=train), fifty, World.alone())
    table, objective, model = step.tables[ITEM], step.objective.eval(), step.model
    table.vector[1:].normal_(generator=torch.Generator().manual_seed(0))
    table.bias[1:].normal_(generator=torch.Generator().manual_seed(1))
    sessions = SessionReader(fifty, exposures=True, holdout=2).read(np.array([0]))
    batch = train_batch(sessions, BatchOptions(2, [], True, 9, 0, skipped=skipped))
    target = batch.targets.flatten()
    if skipped:  # one item is shown unclicked before it is clicked
        item = batch.skipped_item.clone()
        item[3] = target[batch.skipped_state[3]]
        batch = replace(batch, skipped_item=item)
    candidates = objective.candidates(batch, 3)
    ids = torch.unique(objective.lookup_ids(batch, candidates)[ITEM])
    actual = objective(batch, {ITEM: table.rows(ids)}, candidates).loss[0].item()

    needed = torch.nonzero(target).squeeze(1)
    state = model.states(batch.items, table.vector[batch.items], batch.profile, needed)
    query = model.query(model.task_representations(state)["next"]).detach().double().numpy()
    score_NI = query @ table.vector.double().numpy().T + table.bias.double().numpy()
    drawn = objective.sampler.draw(NEGATIVES, seed=step.config.seed, step=3)
    assert len(set(drawn.tolist())) < len(drawn)
    added = -np.log(NEGATIVES) - objective.sampler.log_q(drawn) if loss == "sampled_softmax" else np.zeros(NEGATIVES)
    expected, everything = 0.0, list(zip(batch.skipped_state.tolist(), batch.skipped_item.tolist(), strict=True))
    for row, place in enumerate(needed.tolist()):
        of_drawn = (score_NI[row, drawn] + added)[drawn != int(target[place])]
        if hard:
            of_drawn = of_drawn[of_drawn >= np.sort(of_drawn)[-hard] - 1e-8]
        own = [score_NI[row, item] for at, item in everything if at == place and item != int(target[place])]
        negatives = np.concatenate([of_drawn, own])
        expected += loss_by_hand(loss, score_NI[row, int(target[place])], negatives, fifty.manifest.n_items)
    assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("model", "like"), [("rank_esmm", [1, 0, 0, 0]), ("rank_mmoe", [1, 0, 1, 0])])
def test_label_of_a_task_over_the_entire_space_is_that_of_click_and_task(fifty, model, like):
    objective = make_stepper(config(fifty.path, model=model), fifty, World.alone()).objective
    assert objective.tasks == ["click", "like", "share"]
    none, label = torch.zeros(4, dtype=torch.int64), torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]]).float()
    batch = RankBatch(none, none, none[:, None], none[:, None], label)
    assert objective.labels(batch, 0).tolist() == [1, 1, 0, 0]
    assert objective.labels(batch, 1).tolist() == like
