"""What an experiment of the study is: a question, variants of models, and metrics to compare them by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.study.published import Published

NEXT = ("hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr@5", "mrr@10", "mrr@20")
"""Metrics of the next click."""


@dataclass(frozen=True)
class Variant:
    """A model with its options, trained once for each seed.

    Attributes:
        name: in tables.
        trainer: options of `python -m trainer`.
        retrieval: further options of `python -m retrieval`.
        protocol: options of `python -m etl` that replace the dataset's own.
        scenario: of `python -m etl`, where it is not the log's.
        log: options of the generated log that replace the study's own; generated logs only.
        converter: program that makes another log of the log, which is read instead.
        history: read the log's history before it, of the users that both have.
        ranker: whose ranks in the result are judged: the model, `blend` or a baseline.
        members: earlier variants of the experiment, on the same data, whose scores are averaged; nothing is trained.
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
        name: of its page.
        question: as people ask it.
        setup: what is varied and what stays.
        variants: the first is what the others are compared with, unless `pairs` says otherwise.
        metrics: of the table; the first one is that of the figure.
        pairs: variant → what it is compared with.
        generated: needs a generated log.
        unclicked: needs rows that were shown and not clicked.
        flat_rows: needs scenario `ctr`, rows without sessions; all others need sessions.
        seeds: at most; None for the study's.
        published: figures of other protocols.
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
    published: tuple[Published, ...] = ()


def reference(experiment: Experiment, variant: Variant) -> str | None:
    """The name of the variant that a variant is compared with; None for none."""
    name = experiment.pairs.get(variant.name, experiment.variants[0].name)
    return None if name in ("", variant.name) else name
