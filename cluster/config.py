"""Options of `python -m cluster` and their validation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from etl.runtime.errors import InputError
from etl.runtime.options import group, option, read_options

SUBMITS = ("etl", "train", "tune", "evaluate", "pipeline")
TARGETS = ("local", "standalone", "ray", "kubernetes")
ACTIONS = ("up", "down", "status")
TARGETS_OF = {
    "etl": ("local", "standalone", "kubernetes"),
    "train": ("local", "ray", "kubernetes"),
    "tune": ("local", "ray"),
    "evaluate": ("local", "ray", "kubernetes"),
    "pipeline": ("local", "standalone", "ray", "kubernetes"),
}
"""Possible targets of each program."""


@dataclass
class PipelineOptions:
    """Steps of a pipeline; other options are passed to the programs."""

    name: str = option("demo", "name of the preset")
    work: str = option("runs/demo", "folder for the outputs of all steps")
    input: str | None = option(None, "log to read; pipeline=demo alone has one of its own, MovieLens-100K")
    scenario: str = option("qb_video", "scenario of the log")
    etl: str = option("", "further options of python -m etl, separated by spaces")
    models: list[str] = option([], "runs to train: 'NAME', which stands for model=NAME, or 'NAME option=value …'")
    trainer: str = option("", "options of python -m trainer for every run, separated by spaces")
    retrieval: str = option("", "further options of python -m retrieval, separated by spaces")
    on_ray: bool = option(False, "evaluate as tasks of the Ray cluster that RAY_ADDRESS names")


@dataclass
class StudyOptions:
    """Options of `pipeline=study`; presets are `study=small`, `twin`, `kuairand` and `tenrec`."""

    name: str = option("small", "name of the preset")
    work: str = option("runs/study-small", "folder for logs, datasets, runs and the site")
    input: str | None = option(None, "folder of the user's files (study=kuairand, study=tenrec)")
    logs: list[str] = option([], "further logs: 'SCENARIO:FILE'")
    movielens: bool = option(False, "run on MovieLens-100K")
    generated: list[str] = option([], "generated logs to run on: 'SCENARIO USERS ITEMS'")
    seeds: int = option(3, "training seeds of each variant", at_least=1)
    experiments: list[str] = option([], "experiments by name; empty = all that the logs can answer")
    etl: str = option("", "further options of python -m etl, separated by spaces")
    trainer: str = option("", "options of python -m trainer for every run, separated by spaces")
    parallel: int = option(0, "runs at a time, a core each; 0 = one for each core", at_least=0)


@dataclass
class LocalOptions:
    """A local cluster of several processes."""

    state: str = option("runs/cluster", "folder for its tokens, logs and process numbers")
    nodes: int = option(2, "Ray nodes and Spark workers, a core each", at_least=1)
    memory: str = option("2g", "memory of a Spark worker")


@dataclass
class KubernetesOptions:
    """Options of the Kubernetes manifests."""

    output: str = option("runs/kubernetes", "folder for the manifests")
    namespace: str = option("nextclick", "namespace of all objects")
    image: str = option("nextclick:latest", "image of all containers, built from cluster/Dockerfile")
    claim: str | None = option(
        "nextclick", "persistent volume claim that all pods see at `mount`; null with s3:// URIs"
    )
    mount: str = option("/shared", "path at which the volume is mounted in every pod")
    store_secret: str | None = option(None, "secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL")
    token_secret: str = option("ray-token", "secret whose key `auth_token` is Ray's authentication token")
    service_account: str = option("spark", "service account of Spark's driver, which creates its executors' pods")
    workers: list[int] = option([2, 8], "minimum and maximum number of training workers")
    gpus: int = option(1, "GPUs of a training worker; 0 trains on CPUs", at_least=0)
    cpus: int = option(8, "cores of a training worker", at_least=1)
    memory_gib: int = option(16, "memory of a training worker in GiB; python -m trainer.plan estimates it", at_least=1)
    apply: bool = option(True, "apply the manifests; false only writes them")
    tolerations: str = option("", "tolerations of all pods, separated by spaces: KEY:EFFECT or KEY=VALUE:EFFECT")
    node_selector: str = option("", "labels of the nodes to run on, separated by spaces: NAME=VALUE")
    queue: str | None = option(None, "Kueue queue of the jobs; training then has the minimum number of workers")
    pull_secret: str | None = option(None, "secret that pulls the image")


@dataclass
class ClusterConfig:
    """Options of `python -m cluster`."""

    submit: str | None = option(None, "program to submit", choices=SUBMITS)
    target: str = option("local", "where the program runs", choices=TARGETS)
    address: str | None = option(None, "spark://HOST:7077, http://HOST:8265 of Ray, or https://HOST:6443 of Kubernetes")
    options: str = option("", "options of the submitted program, separated by spaces")
    name: str = option("nextclick", "name of the submitted job")
    python: str = option("python", "interpreter on the cluster's machines")
    interface: str | None = option(None, "network interface of the workers' traffic, where hosts have several")
    install: bool = option(False, "Ray: let the machines install requirements.lock first")
    action: str | None = option(None, "what to do with the cluster on this machine", choices=ACTIONS)
    local: LocalOptions = group(LocalOptions)
    kubernetes: KubernetesOptions = group(KubernetesOptions)
    pipeline: PipelineOptions = group(PipelineOptions)
    study: StudyOptions = group(StudyOptions)


def parse_run(run: str) -> tuple[str, list[str]]:
    """Name and trainer options of an entry of `pipeline.models`.

    Raises:
        InputError: a quote is not closed.

    >>> parse_run("gru4rec"), parse_run("alone model=hybrid head=single")
    (('gru4rec', ['model=gru4rec']), ('alone', ['model=hybrid', 'head=single']))
    """
    name, *options = words("pipeline.models", run)
    return name, options or [f"model={name}"]


FREE_TEXT = (
    "options",
    "address",
    "pipeline.etl",
    "pipeline.trainer",
    "pipeline.retrieval",
    "study.etl",
    "study.trainer",
    "kubernetes.tolerations",
    "kubernetes.node_selector",
)
"""Options with free-text values (options, addresses), whose `=` and `:` Hydra would interpret."""
QUOTED = r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\""""
"""Matches a text that is completely quoted."""


def quoted(option: str) -> str:
    """Quote an option's value for Hydra if it is free text and not quoted yet.

    >>> quoted("options=data=d model=hybrid"), quoted("submit=etl")
    ('options="data=d model=hybrid"', 'submit=etl')
    """
    name, equals, value = option.partition("=")
    if name not in FREE_TEXT or not equals or value in ("", "null") or re.fullmatch(QUOTED, value, re.DOTALL):
        return option
    # In Hydra a backslash is literal, except directly before a quote.
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" + m[2] if m[2] else ""), value)
    return f'{name}="{escaped}"'


def load(options: Sequence[str]) -> ClusterConfig:
    """Parse and validate a command line.

    Raises:
        InputError: an option is unknown, missing, ill-typed or out of its range.
    """
    config = read_options(ClusterConfig, "cluster.conf", [quoted(option) for option in options])
    _check_submission(config)
    _check_kubernetes(config)
    _check_study(config.study)
    _check_pipeline(config)
    return config


def _check_submission(config: ClusterConfig) -> None:
    """Raise `InputError` for a target that the program does not have, or without the address of its cluster."""
    if config.submit and config.action:
        raise InputError("submit=… or action=…", "both", "set one of them")
    if config.submit and config.target not in TARGETS_OF[config.submit]:
        fit = ", ".join(TARGETS_OF[config.submit])
        raise InputError(f"target of {fit} for submit={config.submit}", config.target, "choose one of these")
    needs = config.submit and config.target in ("standalone", "ray")
    if needs and not config.address:
        raise InputError("address=…", "none", f"name the {config.target} cluster; action=up starts one here")
    if config.submit and config.target == "standalone" and not str(config.address).startswith("spark://"):
        raise InputError("address=spark://HOST:7077", config.address, "name the master of the Spark cluster")


def words(name: str, text: str) -> list[str]:
    """The words of an option with options of other programs, as a shell splits them.

    Raises:
        InputError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"{name} with closed quotes", f"{text} ({error})", "close or escape the quote") from None


def _check_pipeline(config: ClusterConfig) -> None:
    """Raise `InputError` for folders that are no paths, runs that collide, missing ones, and a study on Spark."""
    for name, work in (("pipeline.work", config.pipeline.work), ("study.work", config.study.work)):
        if "://" in work:
            raise InputError(f"a path for {name}", work, "name a folder; inputs may be URIs")
    for name in ("etl", "trainer", "retrieval"):
        words(f"pipeline.{name}", getattr(config.pipeline, name))
    _check_runs(config.pipeline)
    if config.submit == "pipeline" and config.pipeline.name == "study" and config.target == "standalone":
        hint = "its logs are read here; study.etl may name a Spark master"
        raise InputError("target=local, ray or kubernetes for pipeline=study", config.target, hint)
    if config.pipeline.name not in ("demo", "study") and config.pipeline.input is None:
        raise InputError(f"pipeline.input=FILE for pipeline={config.pipeline.name}", "none", "name the log")


def _check_runs(pipeline: PipelineOptions) -> None:
    """Raise `InputError` for names of runs that collide, or no run."""
    names = [parse_run(run)[0] for run in pipeline.models if run.strip()]
    taken = {"data", "steps", "pipeline", "movielens.csv", *(f"{name}-result" for name in names)}
    for name in names:
        if name in taken or "/" in name or name.startswith(".") or names.count(name) > 1:
            hint = "data, steps, pipeline and NAME-result are folders of the pipeline"
            raise InputError("pipeline.models with a folder name of its own for each run", name, hint)
    if pipeline.name != "study" and not names:
        raise InputError("pipeline.models with at least one run", "none", "choose pipeline=demo")


def _check_study(study: StudyOptions) -> None:
    """Raise `InputError` for entries of generated logs that are not three words."""
    for entry in study.generated:
        if not re.fullmatch(r"\w+ \d+ \d+", entry):
            raise InputError("study.generated=[SCENARIO USERS ITEMS,…]", entry, "write 'qb_video 34240 130637'")


def _check_kubernetes(config: ClusterConfig) -> None:
    """Raise `InputError` for a job without shared storage, an empty range of workers, or ill-formed labels."""
    values = config.kubernetes
    if config.submit == "etl" and config.target == "kubernetes" and values.claim is None:
        raise InputError(
            "kubernetes.claim for submit=etl", "null", "Spark's tasks build the dataset in a folder they share"
        )
    low, high = (values.workers * 2)[:2] if values.workers else (0, 0)
    if not 1 <= low <= high or len(values.workers) > 2:
        raise InputError("kubernetes.workers=[minimum,maximum]", values.workers, "write [2,8]")
    values.workers = [low, high]
    for label in values.node_selector.split():
        if not re.fullmatch(r"[^=]+=[^=]*", label):
            raise InputError("kubernetes.node_selector of NAME=VALUE …", label, "write zone=a disk=ssd")
    for taint in values.tolerations.split():
        if not re.fullmatch(r"[^=:]+(=[^=:]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?", taint):
            hint = "effects are NoSchedule, PreferNoSchedule and NoExecute"
            raise InputError("kubernetes.tolerations of KEY:EFFECT or KEY=VALUE:EFFECT", taint, hint)
