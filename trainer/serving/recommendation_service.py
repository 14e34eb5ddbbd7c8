"""The recommender behind the server: sessions in, recommendations out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from etl.dataset import FEEDBACK_BIT, PLURAL, Dataset
from etl.runtime.arrays import IntArray
from etl.runtime.dataset_folder import MANIFEST
from etl.runtime.errors import InputError
from etl.runtime.files import sha256_of
from etl.runtime.lookup import lookup
from etl.runtime.object_store import absolute, download_if_remote, local_path
from retrieval.blend.ranker import BlendRanker
from retrieval.bundle_folder import RUN_BUNDLE
from retrieval.config import RetrievalConfig
from retrieval.evaluate import reopen
from retrieval.evaluation import Evaluation
from retrieval.item_lists import columns_of_listed
from retrieval.popularity import Popularity
from retrieval.queries import Queries
from retrieval.rankers.index_ranker import search_unseen
from retrieval.result_folder import METRICS
from retrieval.titles import Titles, read_titles
from trainer.data.batch import FeedbackRows
from trainer.data.ragged import Ragged
from trainer.data.reader import Sessions
from trainer.distributed.world import World
from trainer.finished_run import load_exported, open_run
from trainer.inference.scorer import SessionScorer
from trainer.program_configs import ServeConfig
from trainer.serving.session_request import SessionRequest
from trainer.task.registry import model_task_of
from trainer.task.sessions import SessionTask

MAX_SESSIONS = 1_000
"""Maximum sessions per request."""
MIN_ENCODED = 8
"""Minimum batch size of the encoder; smaller batches are repeated.

Matrix products round differently with a single row, and answers should equal those of the evaluation.
"""


@dataclass
class Recommendations:
    """The best unseen candidates of Q sessions, K each.

    Attributes:
        items: dense ids int64 `[Q, K]`, padded with 0.
        scores: float32 `[Q, K]`, of the blend or, without one, of the model.
        probabilities: by feedback task, float32 `[Q, K]`.
        source_ranks: by source of the blend, float32 `[Q, K]`, rank in its list; NaN if the item is not in it.
        unknown: unknown raw ids of each session.
        popular: mask of sessions without a known item, which get the most popular items.
    """

    items: IntArray
    scores: npt.NDArray[np.float32]
    probabilities: dict[str, npt.NDArray[np.float32]]
    source_ranks: dict[str, npt.NDArray[np.float32]]
    unknown: list[list[int]]
    popular: npt.NDArray[np.bool_]


@dataclass
class RecommendationService:
    """All state for serving, in memory.

    Attributes:
        dataset: the training dataset.
        scorer: encoder and heads.
        evaluation: index and options of the evaluation.
        blend: None if the evaluation has none.
        titles: titles by raw item id; may be empty.
        name: name of the model.
    """

    dataset: Dataset
    scorer: SessionScorer
    evaluation: Evaluation
    blend: BlendRanker | None
    titles: Titles
    name: str

    @classmethod
    def open(cls, config: ServeConfig) -> RecommendationService:
        """Load run and evaluation result.

        Raises:
            InputError: not a finished run of a session model, or the result of another bundle.
        """
        run_config, dataset = open_run(config.run, config.data)
        if run_config.is_ranking_model:
            raise InputError("the run of a session model", run_config.model, "ranking models retrieve no items")
        result = download_if_remote(config.result, last_file=METRICS)
        if not (result / METRICS).is_file():
            raise InputError(f"a result with {METRICS}", config.result, "run python -m retrieval first")
        try:
            record = dict(json.loads((result / METRICS).read_text()))
        except ValueError:
            raise InputError(f"a readable {METRICS}", config.result, "evaluate the bundle again") from None
        run = local_path(config.run)
        if record.get("bundle") != sha256_of(run / RUN_BUNDLE / MANIFEST):
            raise InputError("a result of the run's bundle", config.result, f"evaluate bundle={config.run}/bundle")
        options = RetrievalConfig(
            **record["options"],
            bundle=f"{config.run}/bundle",
            data=config.data or run_config.data,
            output="",
            mask_seen=record["mask_seen"],
            baselines=[],
            threads=config.threads,
        )
        if config.threads:
            torch.set_num_threads(config.threads)
        evaluation = reopen(options)
        model_task = model_task_of(run_config, dataset, World.alone())
        assert isinstance(model_task, SessionTask)
        train_step = model_task.train_step(total_steps=1)
        load_exported(run, run_config, model_task, train_step)
        titles = config.titles or options.titles
        return cls(
            dataset,
            model_task.scorer(train_step),
            evaluation,
            evaluation.blend(result),
            read_titles(absolute(titles)) if titles else {},
            model_task.name,
        )

    @property
    def max_k(self) -> int:
        """The longest list that can be requested: the largest cutoff of the evaluation."""
        return self.evaluation.config.deepest

    @property
    def tasks(self) -> list[str]:
        """Feedback tasks of the model."""
        return list(self.scorer.model.feedback_tasks)

    @cached_property
    def actions(self) -> dict[str, int]:
        """Actions on past clicks that the model reads and the log has, with their bits in a request's `feedback`."""
        if not self.scorer.model.reads_actions:
            return {}
        kept = self.dataset.statistics()["kept"]
        return {action: 1 << FEEDBACK_BIT[action] for action, name in PLURAL.items() if kept[name]}

    @cached_property
    def popularity(self) -> Popularity:
        """Popularity of the candidates."""
        return Popularity.of(self.dataset, self.evaluation.index.catalogue.item)

    @cached_property
    def _by_raw_id(self) -> tuple[IntArray, IntArray]:
        """Raw ids, sorted, and their dense ids."""
        dense = np.argsort(self.evaluation.item_id[1:], kind="stable") + 1
        return self.evaluation.item_id[dense], dense

    def dense_ids(self, raw_N: IntArray) -> IntArray:
        """Dense ids of raw ids, 0 if unknown."""
        raw, dense = self._by_raw_id
        index, match = lookup(raw, raw_N)
        return np.where(match, dense[index], 0)

    def title(self, raw_id: int) -> str:
        """Display title of an item."""
        return self.titles.get(raw_id, f"item {raw_id}")

    def find(self, text: str, k: int) -> list[int]:
        """Raw ids of the `k` most clicked candidates whose title or id contains the text."""
        query, found = text.casefold(), list[int]()
        for item in self.popularity.best_first.tolist():
            raw_id = int(self.evaluation.item_id[item])
            if query in self.title(raw_id).casefold() or query == str(raw_id):
                found.append(raw_id)
                if len(found) == k:
                    break
        return found

    def recommend(self, requests: list[SessionRequest], k: int) -> Recommendations:
        """Recommend the `k` best unseen candidates for each session.

        Raises:
            InputError: `k` or the number of sessions is out of its range.
        """
        if not 1 <= k <= self.max_k:
            raise InputError(
                f"k from 1 to {self.max_k}, the evaluation's largest cutoff", k, "evaluate with more cutoffs"
            )
        if not 1 <= len(requests) <= MAX_SESSIONS:
            raise InputError(f"1 to {MAX_SESSIONS} sessions", len(requests), "send several requests")
        sessions, unknown = self._sessions(requests)
        n, known = len(sessions), np.flatnonzero(sessions.items.lengths > 0)
        items, scores = np.zeros((n, k), np.int64), np.full((n, k), -np.inf, np.float32)
        probabilities = {task: np.full((n, k), np.nan, np.float32) for task in self.tasks}
        ranks = {name: np.full((n, k), np.nan, np.float32) for name in (self.blend.learned.names if self.blend else ())}
        if len(known):
            some = sessions.take(known)
            state = self._states(some)
            queries = self._queries(some, state)
            items[known], scores[known], source_ranks = self._ranked(queries, k)
            for task, values in self._probabilities(state, items[known]).items():
                probabilities[task][known] = values
            for name, values in source_ranks.items():
                ranks[name][known] = values
        popular = sessions.items.lengths == 0
        best = self.popularity.best_first[:k]
        items[popular, : len(best)], scores[popular, : len(best)] = best, self.popularity.clicks_of(best)
        return Recommendations(items, scores, probabilities, ranks, unknown, popular)

    def _sessions(self, requests: list[SessionRequest]) -> tuple[Sessions, list[list[int]]]:
        """The last clicks on known items, truncated as in the dataset, and the unknown raw ids."""
        longest = self.dataset.manifest.max_clicks
        columns: dict[str, list[IntArray]] = {"items": [], "feedback": [], "watching_times": []}
        unknown = []
        for request in requests:
            raw = np.array(request.items, np.int64)
            dense = self.dense_ids(raw)
            unknown.append(raw[dense == 0].tolist())
            latest = np.flatnonzero(dense)[-longest:]
            columns["items"].append(dense[latest])
            for name in ("feedback", "watching_times"):
                values = np.array(getattr(request, name) or [0] * len(raw), np.int64)
                columns[name].append(values[latest])
        offset = np.concatenate([[0], np.cumsum([len(row) for row in columns["items"]])]).astype(np.int64)
        lists = {name: Ragged(offset, np.concatenate(rows).astype(np.int64)) for name, rows in columns.items()}
        none = Ragged(np.zeros(len(requests) + 1, np.int64), np.zeros(0, np.int64))
        n_clicks = [len(r.items) if r.n_clicks is None else r.n_clicks for r in requests]
        sessions = Sessions(
            user_id=np.array([r.user_id for r in requests], np.int64),
            n_clicks=np.clip(n_clicks, 0, np.iinfo(np.int32).max).astype(np.int32),
            profile=np.array([[r.gender, r.age] for r in requests], np.int64).clip(-1, 127),
            exposure_items=none,
            exposure_position=none,
            exposure_feedback=none,
            **lists,
        )
        return sessions, unknown

    def _states(self, sessions: Sessions) -> torch.Tensor:
        """States `[Q, S]` after all clicks."""
        row = np.arange(max(len(sessions), MIN_ENCODED)) % len(sessions)
        several = sessions.take(row)
        return self.scorer.states(several, several.items.lengths[:, None])[: len(sessions), 0]

    def _queries(self, sessions: Sessions, state_QS: torch.Tensor) -> Queries:
        row = np.arange(max(len(sessions), MIN_ENCODED)) % len(sessions)
        vector = self.scorer.queries(state_QS[torch.from_numpy(row)])[: len(sessions)].cpu().numpy()
        return Queries(
            sessions.user_id,
            np.zeros(len(sessions), np.int32),
            sessions.items.offset,
            sessions.items.values.astype(np.int32),
            sessions.n_clicks,
            vector,
            self.scorer.transition_weights(sessions, sessions.items.lengths, "next"),
        )

    def _ranked(self, queries: Queries, k: int) -> tuple[IntArray, npt.NDArray[np.float32], dict[str, Any]]:
        """Items and scores `[Q, k]`, and ranks by source, computed as for the evaluation's `topk.parquet`."""
        ranks: dict[str, npt.NDArray[np.float32]] = {}
        score: npt.NDArray[np.floating]
        if self.blend is None:
            score, listed = search_unseen(self.evaluation.index, queries, self.max_k)
        else:
            score, listed, ranks = self.blend.recommend_with_ranks(queries)
        order = columns_of_listed(listed, self.max_k)[:, :k]
        items, scores = np.take_along_axis(listed, order, 1), np.take_along_axis(score, order, 1)
        out = np.zeros((len(queries), k), np.int64), np.full((len(queries), k), -np.inf, np.float32)
        out[0][:, : items.shape[1]], out[1][:, : items.shape[1]] = items, scores
        return *out, {name: rank[:, :k] for name, rank in ranks.items()}

    def _probabilities(self, state_QS: torch.Tensor, item_QK: IntArray) -> dict[str, npt.NDArray[np.float32]]:
        """Probabilities by feedback task of the listed items, as if they were shown next."""
        if not self.tasks:
            return {}
        n, k = item_QK.shape
        session = np.repeat(np.arange(n), k)
        index = np.zeros(n * k, np.int64)
        rows = FeedbackRows(session, index, item_QK.ravel(), index.astype(np.int16), index)
        return {task: p.reshape(n, k) for task, p in self.scorer.feedback(state_QS, rows).items()}
