"""Drawing negatives: train popularity to a power, mixed with uniform."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class NegativeSampler:
    """Draws items with known probabilities, by a binary search in the cumulative distribution.

    Args:
        train_clicks: int64 `[n_items]`, of items 1..n_items.
        popularity_exponent: power of the train clicks (0 = uniform, 1 = popularity).
        uniform_share: share drawn from all items alike, so that items without train clicks are pushed down too.
        clicked_only: items without a train click are no negatives. Their features alone place them, and these may not
            learn that nobody clicked what nobody could.
    """

    def __init__(
        self,
        train_clicks: npt.NDArray[np.int64],
        *,
        popularity_exponent: float,
        uniform_share: float,
        clicked_only: bool = False,
    ) -> None:
        n = len(train_clicks)
        alike = train_clicks > 0 if clicked_only and train_clicks.any() else np.ones(n, bool)
        weight = np.where(train_clicks > 0, train_clicks.astype(np.float64) ** popularity_exponent, 0.0)
        total = weight.sum()
        popular = weight / total if total > 0 else np.full(n, 1.0 / n)
        probability = (1.0 - uniform_share) * popular + uniform_share * alike / alike.sum()
        self.items = np.flatnonzero(alike) + 1
        self.cumulative = np.cumsum(probability)
        self.cumulative /= self.cumulative[-1]
        # An item that a refit meets for the first time counts as the rarest of the others.
        self.log_probability = np.log(np.maximum(probability, probability[probability > 0].min())).astype(np.float32)
        self.share = train_clicks / max(train_clicks.sum(), 1)

    def draw(self, n: int, *, seed: int, step: int) -> npt.NDArray[np.int64]:
        """`n` dense ids, with replacement: the same on every worker for the same step."""
        uniform = np.random.default_rng([seed, step, 0x6E65]).random(n)
        return np.searchsorted(self.cumulative, uniform, side="right").astype(np.int64) + 1

    def log_expected(self, item_N: npt.NDArray[np.int64], *, drawn: int, positives: int) -> npt.NDArray[np.float32]:
        """Log of how often each item is expected among the candidates of a step.

        Args:
            item_N: dense ids.
            drawn: candidates that were drawn from here.
            positives: candidates that are the step's targets, which come as often as train clicks.
        """
        expected = drawn * np.exp(self.log_probability[item_N - 1].astype(np.float64))
        expected += positives * self.share[item_N - 1]
        return np.log(np.maximum(expected, 1e-30)).astype(np.float32)

    def log_q(self, item_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Log probability of a draw being each item."""
        return self.log_probability[item_N - 1]
