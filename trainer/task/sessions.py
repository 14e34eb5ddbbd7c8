"""Session models: next item and feedback tasks over sessions."""

from __future__ import annotations

import math
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from etl.dataset import TRAIN_HOLDOUT, Dataset
from etl.runtime.arrays import IntArray
from etl.runtime.errors import InputError
from retrieval.repeats import count_repeats
from trainer.config import TrainerConfig
from trainer.data.batch import Batch, BatchOptions, targets_of, train_batch
from trainer.data.item_features import feature_codes
from trainer.data.reader import Reader, SessionReader, Sessions
from trainer.distributed.row_lookup import RowLookup
from trainer.distributed.world import World
from trainer.inference.popularity_weight import find_weight, read_weight, write_weight
from trainer.inference.scorer import SessionScorer
from trainer.inference.validation import (
    Validation,
    score_deviation,
    seen_pairs,
    target_queries,
    target_ranks,
    valid_batches,
    valid_sessions,
    validate_sessions,
)
from trainer.models.recommender import Recommender
from trainer.task.base import Collate, feature_tables, make_item_features, make_table, shard_of
from trainer.training.cooccurrence import ppmi_vectors
from trainer.training.objective import INPUT, ITEM, TASK_ITEM_TABLE, SessionObjective
from trainer.training.step import TrainStep

if TYPE_CHECKING:  # imports scipy, rarely needed
    from retrieval.transitions import Transitions
    from trainer.inference.transition_term import TermCandidates, TransitionTerm

FIT_SESSIONS = 5_000
"""Number of valid sessions, over all workers, that weights in the score are fitted on."""


class SessionTask:
    """Session models: a single encoder, or the hybrid."""

    unit = "clicks"

    def total(self, reader: Reader[Any]) -> int:
        """Number of target clicks of an epoch."""
        return reader.total_targets()

    def __init__(self, config: TrainerConfig, dataset: Dataset, world: World) -> None:
        self.config, self.dataset, self.world = config, dataset, world
        self.shown = dataset.shows_exposures
        self.trains_on_shown = self.shown and config.train.exposures
        self.popularity_weight = config.network.popularity_weight or 0.0
        self.term: TransitionTerm | None = None

    def reader(self, holdout: int) -> SessionReader:
        """Reader of training sessions; with `TRAIN_HOLDOUT` also used for validation."""
        config = self.config
        exposures = self.shown and bool(config.feedback_tasks or config.train.skipped_negatives)
        return SessionReader(
            self.dataset,
            exposures=exposures,
            holdout=holdout,
            prefixes=config.train.prefixes,
            actions=config.reads_actions,
        )

    def train_step(self, total_steps: int) -> TrainStep:
        """Newly initialised parameters."""
        config, n_items = self.config, self.dataset.manifest.n_items
        torch.manual_seed(config.seed)
        names = [ITEM] if config.network.tie_embeddings else [ITEM, INPUT]
        own = [TASK_ITEM_TABLE] if config.task_embedding_dim else []
        features = make_item_features(config, self.dataset, [*names, *own])
        feedback_codes = None
        if config.feedback_feature_dim:
            feedback_codes = torch.from_numpy(feature_codes(self.dataset, config.feedback_features)[0])
        model = Recommender(config, features, feedback_codes)
        tables = {ITEM: make_table(config, n_items, self.world, number=0, bias=True)}
        tables[ITEM].set_initial_biases(first_biases(config, self.train_clicks))
        if not config.network.tie_embeddings:
            tables[INPUT] = make_table(config, n_items, self.world, number=1, bias=False)
        if config.task_embedding_dim:
            size = config.task_embedding_dim * len(config.feedback_tasks)
            tables[TASK_ITEM_TABLE] = make_table(config, n_items, self.world, number=3, bias=False, dimension=size)
        tables |= feature_tables(config, features, tables, self.world)
        return TrainStep(config, SessionObjective(config, model, self.train_clicks), tables, total_steps, self.world)

    def init_from_counts(self, train_step: TrainStep, holdout: int) -> None:
        """With `train.ppmi_start`, initialise the vectors of items with train neighbours from their co-occurrence.

        Raises:
            InputError: on all workers, if the first has too little memory.
        """
        length, dimension = self.config.train.ppmi_start, self.config.network.embedding_dim
        if not length:
            return
        self.world.report("initial vectors from co-occurrence")
        vector, problem = torch.zeros(self.dataset.manifest.n_items, dimension), None
        if self.world.is_first:  # other machines may round differently
            try:
                vector = ppmi_vectors(self.dataset, holdout, dimension, self.config.seed)
            except InputError as error:
                problem = error
        problem = self.world.gather(problem)[0]
        if problem:
            raise problem
        vector = self.world.sum(vector.to(self.world.device))  # broadcast: the other workers add zeros
        counted = vector.any(dim=1).nonzero().squeeze(1)
        assert isinstance(train_step.model, Recommender)
        features = train_step.model.item_features
        own, of_values = features.split(length * vector, counted)
        for name in (ITEM, INPUT):
            if name in train_step.tables:
                train_step.tables[name].vector[counted + 1] = own
            if name in features.table_of:
                train_step.tables[features.table_of[name]].vector.copy_(of_values)

    def collate(self, holdout: int, salt: int) -> Collate:
        """The collate function of an epoch."""
        train = self.config.train
        options = BatchOptions(
            holdout=holdout,
            tasks=self.config.feedback_tasks,
            exposures=self.trains_on_shown,
            rows_per_session=train.exposures_per_session,
            salt=salt,
            prefixes=train.prefixes,
            skipped=train.skipped_negatives if self.shown else 0,
            actions=self.config.reads_actions,
        )

        def collate(window: Sessions, mine: IntArray, step: IntArray, /) -> Batch:
            positives = targets_of(window.take(step), holdout) if train.batch_positives else None
            return train_batch(window.take(mine), options, positives)

        return collate

    def sample(self) -> Sessions:
        """This worker's share of the validation sessions."""
        return valid_sessions(self.reader(TRAIN_HOLDOUT), self.config.train.valid_sessions, self.world)

    def scorer(self, train_step: TrainStep) -> SessionScorer:
        """The trained model for inference."""
        assert isinstance(train_step.model, Recommender)
        by_cosine, lookup = self.config.loss == "embedding", None
        if train_step.sharded:
            lookup = RowLookup(train_step.tables, self.world)
        tables = lookup.tables if lookup else train_step.tables
        scorer = SessionScorer(train_step.model, tables, self.world.device, by_cosine, self.term, lookup)
        if self.popularity_weight:
            clicks = torch.from_numpy(np.append(0, self.train_clicks)).to(self.world.device)
            scorer.popularity = (self.popularity_weight * torch.log1p(clicks.double())).float()
        return scorer

    def validate(self, train_step: TrainStep, sample: Sessions) -> Validation:
        """Full ranking of the valid targets, and AUCs of the valid feedback rows."""
        scorer, candidates = self.scorer(train_step), self.candidates
        return validate_sessions(scorer, sample, candidates, self.world, exposures=self.shown, mask_seen=self.mask_seen)

    @cached_property
    def train_clicks(self) -> IntArray:
        """Train clicks of items 1..n_items, int64 `[n_items]`."""
        return self.dataset.items(["train_clicks"])["train_clicks"].to_numpy()

    @cached_property
    def all_candidates(self) -> IntArray:
        """Dense ids of the candidates (items with a click)."""
        return np.flatnonzero(self.dataset.items(["clicks"])["clicks"].to_numpy() > 0) + 1

    @cached_property
    def candidates(self) -> IntArray:
        """Dense ids of the candidates that this worker ranks; with a sharded table those that it owns."""
        shard = shard_of(self.config, self.world)
        candidates = self.all_candidates
        return candidates if shard.size == 1 else candidates[candidates % shard.size == shard.rank]

    def fit_score_weights(self, train_step: TrainStep, sample: Sessions, run: Path) -> None:
        """Fit on valid sessions what a trained model's scores add at inference, and save it in the run.

        First the weight of popularity, unless the configuration has one; then those of counted transitions, for models
        with transitions.
        """
        max_sessions = -(-FIT_SESSIONS // self.world.size)
        some = sample.take(np.arange(min(len(sample), max_sessions)))
        if self.config.network.popularity_weight is None:
            self._fit_popularity(train_step, some)
            if self.world.is_first:
                write_weight(run, self.popularity_weight)
        if self.config.network.transitions:
            self._fit_transitions(train_step, sample, some, run)

    def _fit_popularity(self, train_step: TrainStep, sample: Sessions) -> None:
        """Fit the weight of popularity, without transitions."""
        self.popularity_weight, self.term = 0.0, None
        scorer = self.scorer(train_step)
        queries = target_queries(scorer, sample, mask_seen=self.mask_seen)
        deviation = score_deviation(scorer, queries, self.all_candidates, self.world)

        def ranks_with(weight: float) -> IntArray:
            self.popularity_weight = weight
            scorer = self.scorer(train_step)
            return target_ranks(scorer, queries, self.candidates, self.world, f"trying popularity weight {weight:.3g}")

        self.popularity_weight = find_weight(ranks_with, deviation)

    def _fit_transitions(self, train_step: TrainStep, sample: Sessions, some: Sessions, run: Path) -> None:
        """Fit the weights of the counted transitions.

        Cross-fitting: each fold's valid sessions use weights fitted on the others. Weights that do not raise NDCG@20
        are set to 0.

        Args:
            train_step: the trained parameters.
            sample: this worker's valid sessions, which decide whether the weights are used.
            some: those of them that the weights are fitted on.
            run: the run folder.
        """
        from trainer.inference.transition_term import TermCandidates, TransitionTerm, count, fit_term_weights

        before = self.validate(train_step, sample).metrics["ndcg@20"] or 0.0
        self.world.report("counting transitions")
        transitions = count(self.dataset, run, TRAIN_HOLDOUT)
        mine = self.term_candidates(train_step, some, transitions)
        parts = [part for share in self.world.gather(mine) for part in share]
        self.world.report("fitting transition weights")
        fitted = fit_term_weights(TermCandidates.joined(parts)) if self.world.is_first and parts else None
        weights = self.world.gather(fitted)[0]
        self.term = None if weights is None else TransitionTerm(transitions, self.train_clicks, *weights)
        after = self.validate(train_step, sample).metrics["ndcg@20"] or 0.0
        if self.term and after <= before:
            self.term = self.term.without()
        if self.term and self.world.is_first:
            self.term.write(run)

    def term_candidates(
        self, train_step: TrainStep, sessions: Sessions, transitions: Transitions
    ) -> list[TermCandidates]:
        """Candidates for fitting, by batch of this worker's valid sessions."""
        from trainer.inference.transition_term import contexts, find_candidates

        scorer, out, done = self.scorer(train_step), [], 0
        for some, visible in valid_batches(sessions):
            self.world.report("finding candidates for transition weights", done, len(sessions), "sessions")
            done += len(some)
            query = scorer.queries(scorer.states(some, visible[:, None])[:, 0])
            target = some.items.values[some.items.offset[:-1] + visible]
            seen = tuple(seen_pairs(some, visible).numpy()) if self.mask_seen else None
            score_of = partial(inner_products, scorer, query)
            context = contexts(some, visible)
            out.append(
                find_candidates(
                    transitions, self.train_clicks, context, some.user_id, target, score_of, self.candidates, seen
                )
            )
        return out

    def load_score_weights(self, run: Path, holdout: int) -> None:
        """Load the weights that the run fitted, and count the transitions of the training clicks."""
        if self.config.network.popularity_weight is None:
            self.popularity_weight = read_weight(run) or self.popularity_weight
        if self.config.network.transitions:
            from trainer.inference.transition_term import WEIGHTS, TransitionTerm, count

            if (run / WEIGHTS).is_file():
                self.term = TransitionTerm.read(run, count(self.dataset, run, holdout), self.train_clicks)

    @cached_property
    def mask_seen(self) -> bool:
        """Whether seen items are excluded from the candidates, as by `mask_seen=auto` of the evaluation."""
        return count_repeats(self.dataset).mask_seen

    @property
    def name(self) -> str:
        """Display name of the model; for a hybrid with encoders and head."""
        config = self.config
        return f"hybrid ({'+'.join(config.encoders)}, {config.head})" if config.model == "hybrid" else config.model


def inner_products(scorer: SessionScorer, query_QD: torch.Tensor, item_C: IntArray) -> npt.NDArray[np.float32]:
    """Inner products `[Q, C]` of queries and items."""
    item = torch.from_numpy(item_C).to(query_QD.device)
    return (query_QD @ scorer.item_vectors(item).t()).cpu().numpy()


def first_biases(config: TrainerConfig, train_clicks: IntArray) -> torch.Tensor:
    """Initial item biases, float32 `[n_items]`.

    They spare the model learning base rates, which takes more than an epoch: for softmax losses item popularity, the
    log of the click counts; for gBCE, which scores each item separately, the log of 1 / n_items for every item.
    """
    if config.loss == "gbce":
        return torch.full((len(train_clicks),), -math.log(len(train_clicks)))
    if config.network.popularity_bias and config.loss in ("softmax", "sampled_softmax"):
        log_clicks = torch.from_numpy(np.log1p(train_clicks.astype(np.float64)))
        return (log_clicks - log_clicks.mean()).float()
    return torch.zeros(len(train_clicks))
