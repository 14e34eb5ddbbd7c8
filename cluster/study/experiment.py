"""Definition of an experiment: a question, model variants, and metrics to compare them by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.study.published import PublishedTable

NEXT = ("hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr@5", "mrr@10", "mrr@20")
"""Next-click metrics."""


@dataclass(frozen=True)
class Variant:
    """A model with its options, trained once per seed.

    Attributes:
        name: name in tables.
        trainer: options of `python -m trainer`.
        retrieval: further options of `python -m retrieval`.
        protocol: options of `python -m etl` that override the dataset's.
        scenario: scenario of `python -m etl`, if not the log's.
        log: options of the generated log that override the study's; generated logs only.
        converter: program that converts the log to another one, which is used instead.
        history: whether to prepend the log's history, for the users in both.
        ranker: ranker of the result to evaluate: the model, `blend` or a baseline.
        members: earlier variants of the experiment, on the same data, to ensemble by mean score; nothing is trained.
    """

    name: str
    trainer: tuple[str, ...] = ()
    retrieval: tuple[str, ...] = ("blend=none", "baselines=[popularity]")
    protocol: tuple[str, ...] = ()
    scenario: str = ""
    log: tuple[str, ...] = ()
    converter: str = ""
    history: bool = False
    ranker: str = "model"
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """A question with the variants that answer it.

    Attributes:
        name: name of its page.
        question: the question in plain words.
        setup: what is varied and what is fixed.
        variants: the others are compared with the first, unless set by `pairs`.
        metrics: metrics of the table; the first is that of the figure.
        pairs: variant → its reference variant.
        generated: whether it needs a generated log.
        unclicked: whether it needs unclicked rows.
        flat_rows: whether it needs scenario `ctr` (rows without sessions); all others need sessions.
        seeds: maximum number of seeds; None = the study's.
        published: published results by other protocols.
    """

    name: str
    question: str
    setup: str
    variants: tuple[Variant, ...]
    metrics: tuple[str, ...] = NEXT
    pairs: Mapping[str, str] = field(default_factory=dict)
    generated: bool = False
    unclicked: bool = False
    flat_rows: bool = False
    seeds: int | None = None
    published: tuple[PublishedTable, ...] = ()


def reference(experiment: Experiment, variant: Variant) -> str | None:
    """The name of a variant's reference variant; None if it has none."""
    name = experiment.pairs.get(variant.name, experiment.variants[0].name)
    return None if name in ("", variant.name) else name
