"""Re-ranks the sum's best candidates with LambdaRank (Burges 2010) on LightGBM trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from retrieval.blend.pool import NOT_LISTED, Pool
from retrieval.sources.sparse_rows import largest_of_rows

SHORTLIST = 100
"""Number of best candidates by the sum that are re-ranked per query."""
MIN_HITS = 200
"""Minimum number of training queries with their target on the shortlist."""
ROUNDS, PATIENCE, HELD_BACK = 300, 25, 5
"""Maximum trees; early stopping rounds; one query in `HELD_BACK` is held out for early stopping."""
PARAMETERS: dict[str, Any] = {
    "objective": "lambdarank",
    "metric": "ndcg",
    "eval_at": [10],
    "lambdarank_truncation_level": 20,
    "learning_rate": 0.07,
    "num_leaves": 15,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 1.0,
    "deterministic": True,
    "force_row_wise": True,
    "seed": 0,
    "verbosity": -1,
}


def on_shortlist(pool: Pool, sum_N: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.bool_]:
    """Mask of the `size` best candidates of each query by the sum, ties by ascending id."""
    indptr = np.concatenate([[0], np.cumsum(np.bincount(pool.query, minlength=pool.n_queries))])
    scores = sparse.csr_matrix((sum_N, np.arange(len(sum_N)), indptr), shape=(pool.n_queries, max(len(sum_N), 1)))
    chosen = np.zeros(len(sum_N), bool)
    chosen[largest_of_rows(scores, size).indices] = True
    return chosen


def features(
    pool: Pool, sum_N: npt.NDArray[np.float32], context: dict[str, npt.NDArray[np.floating]]
) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Names `[F]` and values `[N, F]` of the re-ranker's features.

    Args:
        pool: the candidates.
        sum_N: their weighted sum.
        context: candidate features other than source scores `[N]`, by name.
    """
    columns: dict[str, npt.NDArray[np.floating]] = {"sum": sum_N, "popularity": pool.popularity}
    for row, name in enumerate(pool.names):
        columns |= {f"{name} share": pool.share[row], f"{name} rank": pool.rank[row], f"{name} score": pool.raw[row]}
    columns["sources"] = (pool.rank < NOT_LISTED).sum(axis=0)
    columns |= context
    return list(columns), np.stack([values.astype(np.float32) for values in columns.values()], axis=1)


def learn(
    names: Sequence[str],
    value_NF: npt.NDArray[np.float32],
    pool: Pool,
    threads: int,
    rounds: int | None = None,
) -> tuple[str, int]:
    """Train a model; returns its text and number of trees.

    Args:
        names, value_NF: the result of `features`.
        pool: the candidates; queries without their target in the pool are left out.
        threads: LightGBM threads; the model does not depend on it.
        rounds: number of trees; None = early stopping on held-out queries.
    """
    import lightgbm as lgb  # slow import: loads much of scikit-learn

    has_target = np.bincount(pool.query[pool.is_target], minlength=pool.n_queries) > 0
    # Hold out every fifth training query.
    held = has_target & (np.cumsum(has_target) % HELD_BACK == 0) if rounds is None else np.zeros_like(has_target)

    def data(query_Q: npt.NDArray[np.bool_], reference: Any = None) -> Any:
        chosen = query_Q[pool.query]
        group = np.bincount(pool.query[chosen], minlength=pool.n_queries)
        label = pool.is_target[chosen].astype(np.int32)
        return lgb.Dataset(
            value_NF[chosen], label, group=group[group > 0], feature_name=list(names), reference=reference
        )

    parameters = PARAMETERS | {"num_threads": threads}
    train = data(has_target & ~held)
    if rounds is not None:
        model = lgb.train(parameters, train, rounds)
        return model.model_to_string(), rounds
    stop = lgb.early_stopping(PATIENCE, verbose=False)
    model = lgb.train(parameters, train, ROUNDS, valid_sets=[data(held, train)], callbacks=[stop])
    return model.model_to_string(num_iteration=model.best_iteration), model.best_iteration


class Reranker:
    """A trained model. LightGBM predicts each row independently of the others."""

    def __init__(self, text: str, threads: int) -> None:
        import lightgbm as lgb

        self.booster, self.threads = lgb.Booster(model_str=text), threads

    def __call__(self, value_NF: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Scores `[N]`."""
        if not len(value_NF):
            return np.zeros(0)
        return np.asarray(self.booster.predict(value_NF, num_threads=self.threads), np.float64)
