"""A trained model applied to sessions: queries, item vectors, feedback scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.batch import FeedbackRows, make_batch, pad
from trainer.data.order import Int
from trainer.data.reader import Sessions
from trainer.models.recommender import Recommender
from trainer.sparse.table import ItemTable


@dataclass
class Scorer:
    """Applies a model; dropout is off.

    Attributes:
        model: the networks.
        table: item vectors and biases.
        device: where both are.
    """

    model: Recommender
    table: ItemTable
    device: torch.device

    @torch.inference_mode()
    def states(self, sessions: Sessions, visible_B: Int) -> torch.Tensor:
        """States `[B, T, S]` after each of the first `visible_B` clicks of B sessions."""
        self.model.eval()
        items = pad(sessions.items, visible_B, max(1, int(visible_B.max(initial=0))))
        batch = make_batch(items, np.zeros_like(items), sessions.profile, None, []).to(self.device)
        return self.model.states(self.table.vector[batch.items], batch.profile)

    @torch.inference_mode()
    def queries(self, state_NS: torch.Tensor) -> torch.Tensor:
        """Queries `[N, D + 1]`; the last element multiplies the item's bias."""
        query = self.model.query(self.model.mixes(state_NS)["next"])
        return torch.cat([query, query.new_ones(len(query), 1)], dim=1)

    def item_vectors(self) -> torch.Tensor:
        """Vectors of items 1..n_items with the bias as the last element, `[n_items, D + 1]`."""
        return torch.cat([self.table.vector[1:], self.table.bias[1:, None]], dim=1)

    @torch.inference_mode()
    def feedback(self, state_BTS: torch.Tensor, rows: FeedbackRows) -> dict[str, npt.NDArray[np.float32]]:
        """Probability of each feedback task for rows, from the state after `position` clicks."""
        session, position, item = (
            torch.from_numpy(values).to(self.device) for values in (rows.session, rows.position, rows.item)
        )
        used, place = torch.unique(session * state_BTS.shape[1] + position - 1, return_inverse=True)
        mixes = self.model.mixes(state_BTS.flatten(0, 1)[used])
        vector = self.table.vector[item]
        return {
            task: torch.sigmoid(self.model.feedback_logits(task, mixes[task][place], vector)).cpu().numpy()
            for task in self.model.feedback_tasks
        }

    @torch.inference_mode()
    def gates(self, state_NS: torch.Tensor) -> dict[str, npt.NDArray[np.float64]]:
        """Gate weights of states `[N, E]` by task; empty without gates."""
        return {task: weight.double().cpu().numpy() for task, weight in self.model.gate_weights(state_NS).items()}
