"""Options of `python -m cluster`, checked once at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from etl.command import group, option, read_options
from etl.folder import InputError


@dataclass
class PipelineOptions:
    """What a pipeline runs; further options are those of the programs themselves."""

    name: str = option("demo", "name of the preset")
    work: str = option("runs/demo", "folder for the outputs of all steps")
    input: str | None = option(None, "log to read; MovieLens-100K where none is named")
    scenario: str = option("qb_video", "scenario of the log")
    etl: str = option("", "further options of python -m etl, separated by spaces")
    models: list[str] = option([], "runs to train: 'NAME', which stands for model=NAME, or 'NAME option=value …'")
    trainer: str = option("", "options of python -m trainer for every run, separated by spaces")
    retrieval: str = option("", "further options of python -m retrieval, separated by spaces")


@dataclass
class ClusterConfig:
    """Options of `python -m cluster`."""

    pipeline: PipelineOptions = group(PipelineOptions)


def training_options(run: str) -> tuple[str, list[str]]:
    """Name and trainer options of an entry of `pipeline.models`.

    >>> training_options("gru4rec"), training_options("alone model=hybrid head=single")
    (('gru4rec', ['model=gru4rec']), ('alone', ['model=hybrid', 'head=single']))
    """
    name, *options = run.split()
    return name, options or [f"model={name}"]


def load(options: Sequence[str]) -> ClusterConfig:
    """The checked configuration of a command line.

    Raises:
        InputError: an option is unknown, missing, ill-typed or out of its range.
    """
    config = read_options(ClusterConfig, "cluster.conf", options)
    if not any(run.strip() for run in config.pipeline.models):
        raise InputError("pipeline.models with at least one run", "none", "choose pipeline=demo")
    return config
