"""Cosine scores divided by a temperature: in the loss and in the exported vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from trainer.__main__ import main
from trainer.config import TrainerConfig
from trainer.data.batch import BatchOptions, train_batch
from trainer.data.reader import SessionReader
from trainer.distributed.world import World
from trainer.option_groups import ModelOptions
from trainer.task.registry import model_task_of
from trainer.training.objective import ITEM

SIZES = {"embedding_dim": 8, "hidden_size": 8, "positions": 30, "embedding_dropout": 0.0, "state_dropout": 0.0}


@pytest.mark.parametrize("model", ["gru4rec", "hybrid"])
def test_loss_and_exported_vectors_score_by_cosine_over_temperature(fifty, model):
    network = ModelOptions(cosine_temperature=0.2, tower=8, **SIZES)
    config = TrainerConfig(data="", output="", model=model, tasks=["next"], loss="softmax", network=network)
    model_task = model_task_of(config, fifty, World.alone())
    train_step = model_task.train_step(1)
    table = train_step.tables[ITEM]
    table.bias[1:] = 0.1 * torch.randn(len(table.bias) - 1)
    reader = SessionReader(fifty, exposures=False, holdout=2)
    sessions = reader.read(np.array([0]))
    batch = train_batch(sessions, BatchOptions(holdout=2, tasks=[], exposures=False, rows_per_session=1, salt=0))
    objective = train_step.objective.eval()
    candidates = objective.candidates(batch, 0)
    rows = {ITEM: table.rows(torch.unique(objective.lookup_ids(batch, candidates)[ITEM]))}
    actual = objective(batch, rows, candidates).loss[0]

    scorer, after = model_task.scorer(train_step), np.arange(1, 4)[None].repeat(len(sessions), 0)
    states = scorer.states(sessions, after)
    queries, items = scorer.queries(states.flatten(0, 1)), scorer.item_vectors()
    assert torch.allclose(queries[:, :-1].norm(dim=1), torch.tensor(5.0))
    assert torch.allclose(items[:, :-1].norm(dim=1), torch.tensor(1.0))

    used = batch.targets.flatten() != 0
    state = train_step.model.states(
        batch.items, table.vector[batch.items], batch.profile, torch.nonzero(used).squeeze(1)
    )
    mix = train_step.model.next_tower(train_step.model.task_representations(state)["next"])
    cosine = functional.cosine_similarity(mix[:, None], table.vector[None, 1:], dim=2)
    logit, target = cosine / 0.2 + table.bias[1:], batch.targets.flatten()[used] - 1
    expected = functional.cross_entropy(logit, target, reduction="sum")
    assert actual.item() == pytest.approx(expected.item(), rel=1e-4)

    session, click = np.divmod(torch.nonzero(used).squeeze(1).numpy(), batch.targets.shape[1])
    searched = queries.view(*after.shape, -1)[session[click == 0], 0] @ items.t()
    assert torch.allclose(searched, logit[torch.from_numpy(click == 0)], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model=rank_single", "network.cosine_temperature=0.1"], "rank_single"),
        (["model=gru4rec", "loss=embedding", "network.cosine_temperature=0.1"], "cosine already"),
        (["model=gru4rec", "loss=softmax", "train.hard_negatives=5"], "loss=softmax"),
        (["model=gru4rec", "network.cosine_temperature=0"], "above 0"),
    ],
)
def test_options_without_an_effect_are_refused(tmp_path, capfd, options, words):
    assert main([f"data={tmp_path}", f"output={tmp_path / 'run'}", *options]) == 2
    assert words in capfd.readouterr().err
