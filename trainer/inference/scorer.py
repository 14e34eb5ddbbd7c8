"""Inference of a trained model on sessions or rows: query vectors, item vectors, feedback scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from etl.runtime.arrays import IntArray
from trainer.data.batch import FeedbackRows, action_codes, make_batch, pad
from trainer.data.ranking_rows import FlatRows, rank_batch
from trainer.data.reader import Sessions
from trainer.distributed.row_lookup import RowLookup
from trainer.models.embedding_table import FixedTable, ReadTable
from trainer.models.ranker import Ranker
from trainer.models.recommender import Recommender
from trainer.training.objective import INPUT, ITEM, TASK_ITEM_TABLE, USER

if TYPE_CHECKING:
    from trainer.inference.transition_term import TransitionTerm  # imports scipy, rarely needed

Scores = dict[str, npt.NDArray[np.float32]]


def _chosen(tasks: list[str], only: Collection[str] | None) -> list[str]:
    return [task for task in tasks if only is None or task in only]


@dataclass
class SessionScorer:
    """Inference of a session model, without dropout.

    Attributes:
        model: the networks.
        tables: item vectors, and the encoder's input vectors if not tied.
        device: of model and tables.
        by_cosine: item vectors are normalised for the search (loss `embedding`).
        term: counted transitions added to the scores; None = not used.
        lookup: remote lookup behind `tables` if they are sharded; None if all rows are local.
        only: the feedback tasks to score; None = all.
        popularity: float32 `[n_items + 1]`, added to the item biases (`network.popularity_weight`); None = not used.
    """

    model: Recommender
    tables: Mapping[str, ReadTable]
    device: torch.device
    by_cosine: bool = False
    term: TransitionTerm | None = None
    lookup: RowLookup | None = None
    only: Collection[str] | None = None
    popularity: torch.Tensor | None = None

    @property
    def feedback_tasks(self) -> list[str]:
        """The feedback tasks that are scored."""
        return _chosen(self.model.feedback_tasks, self.only)

    def finish(self) -> None:
        """Serve remote lookups until all workers are done with theirs."""
        if self.lookup:
            self.lookup.finish()

    def local_shard_scorer(self) -> SessionScorer:
        """A scorer of the items owned by this worker, which reads without communication.

        Call it before `finish`: the embeddings of item features, which are few, are looked up here.
        """
        if self.lookup is None:
            return self
        tables: dict[str, ReadTable] = dict(self.lookup.shards)
        if (name := self.model.item_features.table_of.get(ITEM)) is not None:
            complete = torch.arange(self.tables[name].n_rows, device=self.device)
            tables[name] = FixedTable(*self.tables[name].read(complete))
        return replace(self, tables=tables, lookup=None)

    @torch.inference_mode()
    def states(self, sessions: Sessions, after_BQ: IntArray) -> torch.Tensor:
        """States `[B, Q, S]` of B sessions after their first `after_BQ` clicks (at least 1)."""
        self.model.eval()
        visible = after_BQ.max(axis=1)
        items = pad(sessions.items, visible, max(1, int(visible.max(initial=0))))
        batch = make_batch(items, np.zeros_like(items), sessions.profile, None, []).to(self.device)
        actions = None
        if self.model.reads_actions:
            actions = torch.from_numpy(action_codes(sessions, visible, items.shape[1])).to(self.device)
        places = np.arange(len(items))[:, None] * items.shape[1] + after_BQ - 1
        name = INPUT if INPUT in self.tables else ITEM
        click = self.model.item_features.vectors(self.tables, name, batch.items)
        needed = torch.from_numpy(places.ravel()).to(self.device)
        return self.model.states(batch.items, click, batch.profile, needed, actions).view(*after_BQ.shape, -1)

    @torch.inference_mode()
    def queries(self, state_NS: torch.Tensor) -> torch.Tensor:
        """Queries `[N, D + 1]`; the last element is the factor of the item bias."""
        query = self.model.query(self.model.task_representations(state_NS)["next"])
        return torch.cat([query, query.new_ones(len(query), 1)], dim=1)

    def transition_weights(self, sessions: Sessions, visible_B: IntArray, split: str) -> npt.NDArray[np.float32]:
        """Weights of the counted transitions `[B, T]` after the first `visible_B` clicks; `[B, 0]` if not used."""
        return self.term.weights(sessions, visible_B, split) if self.term else np.zeros((len(sessions), 0), np.float32)

    @property
    def dimension(self) -> int:
        """Dimension of the exported vectors, including the bias."""
        return self.tables[ITEM].dimension + 1

    def item_vectors(self, item_C: torch.Tensor | None = None) -> torch.Tensor:
        """Item vectors with the bias as the last element, `[C, D + 1]`; by default of all items 1..n_items."""
        chosen = torch.arange(1, self.tables[ITEM].n_rows, device=self.device) if item_C is None else item_C
        vector, bias = self.model.item_features.read(self.tables, ITEM, chosen)
        vector = self.model.scoring_vectors(vector)
        if self.by_cosine:
            vector, bias = torch.nn.functional.normalize(vector, dim=1), torch.zeros_like(bias)
        if self.popularity is not None:
            bias = bias + self.popularity[chosen]
        return torch.cat([vector, bias[:, None]], dim=1)

    @torch.inference_mode()
    def feedback(self, state_BS: torch.Tensor, rows: FeedbackRows) -> Scores:
        """Probability of each feedback task for rows, each scored from its session's state."""
        session, item = (torch.from_numpy(values).to(self.device) for values in (rows.session, rows.item))
        features, own = self.model.item_features, None
        vector = features.vectors(self.tables, ITEM, item)
        if self.model.task_embedding_dim:
            own = features.vectors(self.tables, TASK_ITEM_TABLE, item)
        task_representations = self.model.task_representations(state_BS)
        logits = self.model.feedback_logits(state_BS, task_representations, session, item, vector, own, self.only)
        return {task: torch.sigmoid(logit).cpu().numpy() for task, logit in logits.items()}

    @torch.inference_mode()
    def gates(self, state_NS: torch.Tensor) -> dict[str, npt.NDArray[np.float64]]:
        """Gate weights of states `[N, E]` by task; empty without gates."""
        return {task: weight.double().cpu().numpy() for task, weight in self.model.gate_weights(state_NS).items()}


@dataclass
class RankScorer:
    """Inference of a ranking model, without dropout.

    Attributes:
        model: the networks.
        tables: vectors of items and users.
        users: int64, all users, sorted.
        device: of model and tables.
        only: the feedback tasks to score; None = all.
    """

    model: Ranker
    tables: Mapping[str, ReadTable]
    users: IntArray
    device: torch.device
    only: Collection[str] | None = None

    @property
    def feedback_tasks(self) -> list[str]:
        """The feedback tasks that are scored."""
        return _chosen(self.model.feedback_tasks, self.only)

    @torch.inference_mode()
    def features(self, rows: FlatRows) -> torch.Tensor:
        """Input features of the head, `[F, S]`."""
        self.model.eval()
        batch = rank_batch(rows, self.users, self.model.feedback_tasks).to(self.device)
        return self.model.features(
            self.tables[USER].read(batch.user)[0],
            self.model.item_features.vectors(self.tables, ITEM, batch.item),
            self.model.item_features.vectors(self.tables, ITEM, batch.history),
            batch.item,
            batch.history,
            batch.profile,
        )

    @torch.inference_mode()
    def feedback(self, feature_FS: torch.Tensor) -> Scores:
        """Probability of each feedback task for rows."""
        logits = self.model.logits(feature_FS)
        return {task: torch.sigmoid(logits[task]).cpu().numpy() for task in self.feedback_tasks}

    @torch.inference_mode()
    def gates(self, feature_FS: torch.Tensor) -> dict[str, npt.NDArray[np.float64]]:
        """Gate weights of rows `[F, E]` by task; empty without gates."""
        return {task: weight.double().cpu().numpy() for task, weight in self.model.gate_weights(feature_FS).items()}
