"""Actions on past clicks: what models read of them, and no leakage of later ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from etl.dataset import Dataset
from retrieval.bundle import open_bundle
from tests.support.engine import build, write_log
from tests.support.runs import SMALL, assert_same_run, killed_at_step
from trainer.__main__ import main
from trainer.config import ENCODERS, TrainerConfig
from trainer.data.batch import ACTION_BITS, BatchOptions, action_codes, feedback_rows, train_batch
from trainer.data.ragged import Ragged
from trainer.data.reader import SessionReader
from trainer.distributed.world import World
from trainer.inference.export import score_sessions
from trainer.models.feedback import FeedbackInputs
from trainer.models.past_actions import PastActions
from trainer.models.recommender import Recommender
from trainer.option_groups import ModelOptions
from trainer.task.registry import model_task_of


@pytest.fixture(scope="module")
def sessions(fifty):
    reader = SessionReader(fifty, exposures=True, holdout=2, actions=True)
    return reader.read(np.arange(len(reader.groups)))


def flipped(sessions, back: int):
    """The same sessions with other outcomes of the click `back` from the end (1 = last) and of its exposure row."""
    position = sessions.items.offset[1:] - back
    feedback, entered = sessions.feedback.values.copy(), sessions.watching_times.values.copy()
    feedback[position] ^= 31
    entered[position] += 1
    shown = sessions.exposure_items
    block = sessions.items.lengths[shown.row] - back
    own = (sessions.exposure_position.values == block) & (sessions.exposure_feedback.values >= 128)
    return replace(
        sessions,
        feedback=Ragged(sessions.items.offset, feedback),
        watching_times=Ragged(sessions.items.offset, entered),
        exposure_feedback=Ragged(
            shown.offset, np.where(own, sessions.exposure_feedback.values ^ 31, sessions.exposure_feedback.values)
        ),
    )


ENCODER_READS = {"past_actions": True}
TOWERS_READ = {"feedback_actions": True, "feedback_feature_dim": 3}


def scorer_of(dataset, encoder, reading=ENCODER_READS):
    network = ModelOptions(embedding_dim=8, hidden_size=8, tower=8, positions=64, **reading)
    tasks = ["next", "click", "like"]
    config = TrainerConfig(data="", output="", model="hybrid", tasks=tasks, network=network, encoder=encoder)
    model_task = model_task_of(config, dataset, World.alone())
    scorer = model_task.scorer(model_task.train_step(1))
    actions = scorer.model.past_actions or scorer.model.feedback_features.actions
    torch.nn.init.normal_(actions.weight)
    return scorer


def exported(scorer, sessions) -> dict[str, dict]:
    """For each file of the bundle: query vectors by user, row scores by task, user and row number."""
    actual: dict[str, dict] = {}
    for kind, table in score_sessions(sessions, scorer, ["valid", "test", "next"], exposures=True):
        rows = actual.setdefault(kind, {})
        for row in table.to_pylist():
            key = (row.get("task"), row["user_id"], len(rows))
            rows[key] = row["score"] if "score" in row else row["vector"]
    return actual


@pytest.mark.parametrize(
    ("encoder", "reading"),
    [*((encoder, ENCODER_READS) for encoder in (*ENCODERS, ["gru4rec", "srgnn"])), ("gru4rec", TOWERS_READ)],
    ids=str,
)
def test_scores_depend_only_on_actions_of_clicks_before_their_block(fifty, sessions, encoder, reading):
    """The valid block begins after click n - 2 and ends with click n - 1: flips of n - 2 matter, those of n - 1 do not.

    If only the feedback towers read actions, queries depend on none.
    """
    scorer = scorer_of(fifty, encoder, reading)
    plain = exported(scorer, sessions)
    #  click flipped, counted from the end: which parts change
    changes = {
        1: {"queries-next"},
        2: {"queries-next", "queries-test", "feedback-test"},
        3: {"queries-next", "queries-test", "feedback-test", "queries-valid", "feedback-valid"},
    }
    for back, changed in changes.items():
        other = exported(scorer, flipped(sessions, back))
        for kind, rows in plain.items():
            difference = {k: np.abs(np.subtract(v, other[kind][k])).max() for k, v in rows.items()}
            if reading == TOWERS_READ and kind.startswith("queries"):
                assert max(difference.values()) < 1e-6, (back, kind)
            elif kind in changed:
                assert max(difference.values()) > 1e-3, (back, kind)
            elif kind == "feedback-test":  # rows shown after the last click are scored from the state after it
                late = after_test(sessions)
                before = [d for (_, user, _), d in difference.items() if user not in late]
                assert max(before) < 1e-6
            else:
                assert max(difference.values()) < 1e-6, (back, kind)


def after_test(sessions) -> set[int]:
    """Users with rows after their last click."""
    shown = sessions.exposure_items
    late = sessions.exposure_position.values == sessions.items.lengths[shown.row]
    return set(sessions.user_id[shown.row[late]].tolist())


def changed_states(encoder: str, items: list[int], position: int) -> list[bool]:
    """Which states change if the click at `position` has other actions."""
    network = ModelOptions(embedding_dim=8, hidden_size=8, positions=9, past_actions=True)
    model = Recommender(TrainerConfig(data="", output="", model=encoder, tasks=["next"], network=network)).eval()
    torch.nn.init.normal_(model.past_actions.weight)
    table, item = torch.randn(20, 8), torch.tensor([items])
    actions = torch.randint(0, 128, item.shape)
    other = actions.clone()
    other[0, position] ^= 31
    needed, profile = torch.arange(len(items)), torch.zeros(1, 2, dtype=torch.long)
    states = [model.states(item, table[item], profile, needed, options) for options in (actions, other)]
    return ((states[0] - states[1]).abs().amax(1) > 1e-6).tolist()


def test_feedback_towers_read_the_mean_over_actions_and_features_so_far():
    features = FeedbackInputs(torch.tensor([[0], [1], [2], [0]]), 4, actions=True)
    torch.nn.init.normal_(features.actions.weight)
    items, actions = torch.tensor([[1, 3, 2], [2, 0, 0]]), torch.tensor([[5, 0, 9], [2, 0, 0]])
    of_click = features.embedding.weight[features.codes[items, 0]] + features.actions(actions)
    expected = torch.stack([of_click[0, :2].mean(0), of_click[1, 0], of_click[0].mean(0)])
    assert torch.allclose(features.clicked(items, torch.tensor([1, 3, 2]), actions), expected, atol=1e-6)
    # The number of visits is not read: it may include later ones.
    entered = features.clicked(items, torch.tensor([1, 3, 2]), actions | 1 << ACTION_BITS)
    assert torch.equal(entered, features.clicked(items, torch.tensor([1, 3, 2]), actions))
    alone = FeedbackInputs(torch.zeros(4, 0, dtype=torch.long), 4, actions=True)  # a log without categories
    alone.load_state_dict({"actions.weight": features.actions.weight})
    expected = torch.stack([features.actions(actions)[0].mean(0), features.actions(actions)[1, 0]])
    assert torch.allclose(alone.clicked(items, torch.tensor([2, 3]), actions), expected, atol=1e-6)
    assert alone(items) is None


@pytest.mark.parametrize("encoder", ENCODERS)
def test_actions_change_only_states_from_their_click_on(encoder):
    for position in range(9):
        assert changed_states(encoder, list(range(1, 10)), position) == [at >= position for at in range(9)]


def test_session_graph_node_reads_actions_of_the_latest_click_on_its_item():
    assert changed_states("srgnn", [1, 2, 1, 3], 0) == [True, True, False, False]
    assert changed_states("srgnn", [1, 2, 1, 3], 2) == [False, False, True, True]


def test_action_code_packs_bits_and_visits_and_its_vector_is_their_sum(fifty, sessions):
    bits, entered = sessions.feedback, sessions.watching_times
    visible = sessions.items.lengths - 3
    codes = action_codes(sessions, visible, int(visible.max()))
    layer = PastActions(4)
    torch.nn.init.normal_(layer.weight)
    vectors, met = layer(torch.from_numpy(codes)).detach(), set()
    for row in range(len(sessions)):
        for position in range(int(visible.max())):
            expected = torch.zeros(4)
            if position < visible[row]:
                at = sessions.items.offset[row] + position
                expected = sum((layer.weight[b] for b in range(5) if bits.values[at] >> b & 1), expected)
                often = min(int(entered.values[at]), 3)
                expected = expected + (layer.weight[4 + often] if often else 0)
                met.add((int(bits.values[at]), often))
            assert torch.allclose(vectors[row, position], expected, atol=1e-6)
    assert len(met) > 10
    options = {"holdout": 2, "tasks": ["like"], "exposures": True, "rows_per_session": 9, "salt": 0}
    assert np.array_equal(train_batch(sessions, BatchOptions(**options, actions=True)).actions.numpy(), codes)


def test_without_the_option_actions_are_neither_read_nor_batched(fifty):
    reader = SessionReader(fifty, exposures=True, holdout=2)
    assert "watching_times" not in reader.columns
    sessions = reader.read(np.array([0]))
    options = BatchOptions(holdout=2, tasks=["like"], exposures=True, rows_per_session=9, salt=0)
    assert len(train_batch(sessions, options).actions) == 0
    assert len(feedback_rows(sessions, exposures=True).item) > 0


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Dataset:
    """A liked click is followed by the next item of a ring, any other click by the previous item."""
    folder = tmp_path_factory.mktemp("forks")
    rng, rows = np.random.default_rng(0), []
    for user in range(1, 101):
        item = int(rng.integers(20))
        for _ in range(int(rng.integers(10, 16))):
            like = int(rng.random() < 0.5)
            rows.append((user, 1 + item, 1, 0, like, 0, "c", 1, 1, 1))
            item = (item + (1 if like else -1)) % 20
    log = write_log(folder / "log.csv", rows)
    return build([f"input={log}", f"output={folder / 'data'}", "scenario=qb_video", "shards=2"])


@pytest.mark.parametrize("model", ["gru4rec", "sasrec"])
def test_model_learns_that_an_action_determines_the_next_click(forks, tmp_path, model):
    size = ["network.embedding_dim=16", "network.hidden_size=16", "train.epochs=40", "train.early_stopping_patience=40"]
    quiet = ["network.embedding_dropout=0", "network.state_dropout=0", "loss=softmax", f"model={model}"]
    actual = {}
    for actions in ("false", "true"):
        run = tmp_path / actions
        options = [f"data={forks.path}", f"output={run}", *SMALL, *size, *quiet, f"network.past_actions={actions}"]
        assert main(options) == 0
        actual[actions] = valid_hits_at_1(run)
    assert actual["false"] < 0.65
    assert actual["true"] > 0.9


def valid_hits_at_1(run) -> float:
    bundle = open_bundle(run / "bundle")
    vectors = bundle.item_vectors()
    hits = [(query.vector @ vectors.T).argmax(1) + 1 == query.target for query in bundle.queries("valid")]
    return float(np.concatenate(hits).mean())


def test_killed_run_with_actions_and_features_resumes_bit_identical(fifty, tmp_path):
    more = ["model=hybrid", "train.epochs=2", "network.past_actions=true", "network.item_features=[category]"]
    more += ["network.feedback_feature_dim=3", "train.feedback_learning_rate=0.1"]
    options = [f"data={fifty.path}", *SMALL, *more]
    assert main([*options, f"output={tmp_path / 'a'}"]) == 0
    with killed_at_step(19):
        main([*options, f"output={tmp_path / 'b'}"])
    assert main([*options, f"output={tmp_path / 'b'}"]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_ranking_models_refuse_past_actions(fifty, tmp_path, capfd):
    options = [f"data={fifty.path}", f"output={tmp_path / 'run'}", "model=rank_mmoe", "network.past_actions=true"]
    assert main(options) == 2
    assert capfd.readouterr().err.startswith("error: expected network.past_actions=false for ranking models")
