"""Ray Train: the training loop on Ray's workers, fault tolerance and elasticity."""

from __future__ import annotations

import errno
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, report
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend

from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from etl.runtime.object_store import filesystem, local_path, read_file
from etl.runtime.options import OPENMP_SPIN_ENV
from etl.runtime.reachable import refusal, split_address
from trainer import reachability
from trainer.config import TrainerConfig, from_dict
from trainer.distributed.world import World
from trainer.loop import train
from trainer.ray_environment import environment, local_ray_environment
from trainer.run.folder import is_finished
from trainer.run.run_folder import RunFolder
from trainer.run.signals import Stopped, interrupted_plainly, on_sigterm
from trainer.training.step import NotFiniteError

MAX_FAILURES = 3
STEP_TIMEOUT_SECONDS = 300
"""Timeout of collectives within a step; other waits use `trainer.distributed.world.WAIT`."""
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in a submitted job, whose workers already have its working directory and environment."""
FAILED = ".failed.json"
"""The error that ended all workers, for the starting process to report."""


def run_with_ray(config: TrainerConfig) -> None:
    """Train on Ray workers, on the cluster at RAY_ADDRESS or else a local one.

    If a worker dies, Ray restarts the group, which resumes from our latest checkpoint.

    Raises:
        InputError: a full disk, non-finite losses, a cluster that is unreachable or has too few workers, workers
            that cannot reach one another.
        Stopped: SIGTERM came; the workers have saved a checkpoint and ended.
    """
    requested = config.ray.workers
    workers: Any = tuple(requested) if isinstance(requested, list) else requested
    max_workers = workers[1] if isinstance(workers, tuple) else workers
    with ray_session(max_workers * config.ray.cores):
        _run(config, workers)


@contextmanager
def ray_session(cpus: int = 0) -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS, or start a local one and shut it down after the block.

    Args:
        cpus: minimum number of CPUs of a local cluster.

    Raises:
        InputError: no cluster at RAY_ADDRESS, or it rejects the token.
    """
    packages = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # By default Ray waits ten minutes for the health check of an unreachable host.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "60")
    # Workers may report once Ray has polled the previous report: by default an epoch takes at least 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    # Usage reports would access the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {}
    variables: dict[str, str | None] = {}
    if "RAY_ADDRESS" not in os.environ:
        variables = local_ray_environment()
        cpus = max(cpus, os.cpu_count() or 1)
        local = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if IN_JOB not in os.environ:
        of_workers = {
            "PYTHONPATH": path,
            "RAY_TRAIN_V2_ENABLED": "1",
            OPENMP_SPIN_ENV[0]: os.environ.get(*OPENMP_SPIN_ENV),
        }
        local["runtime_env"] = {"env_vars": of_workers}
    with environment(**variables):
        _connect(**local)
        try:
            yield
        finally:
            ray.shutdown()


def _connect(**options: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    where = split_address(address.removeprefix("ray://"), default_port=6379)
    hint = "start it, correct RAY_ADDRESS, or unset it to train on this machine"
    # Ray itself would retry for minutes and end in a traceback.
    if address not in ("", "auto", "local") and (why := refusal(*where) if where else "no HOST:PORT"):
        raise InputError(f"a Ray cluster at RAY_ADDRESS={address}", why, hint)
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        if not address:
            raise
        cause = " ".join(str(error).split())[:200]
        raise InputError(f"a Ray cluster at RAY_ADDRESS={address} that lets this program in", cause, hint) from None


class ConnectedTorchBackend(_TorchBackend):
    """Sets up torch's process group after checking that all workers reach one another."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Check connectivity, then set up the process group.

        Raises:
            InputError: workers cannot reach one another; Ray Train ends the run without a retry.
        """
        nodes = worker_group.execute(ray.util.get_node_ip_address)
        addresses = ray.get([worker_group.execute_single_async(i, reachability.listen, n) for i, n in enumerate(nodes)])
        targets = reachability.first_of_each_host(addresses)
        if len(targets) > 1:
            reachability.check(addresses, worker_group.execute(reachability.unreachable, targets))
        worker_group.execute(reachability.stop_listening)
        super().on_start(worker_group, backend_config)


class ConnectedTorchConfig(TorchConfig):
    """Selects `ConnectedTorchBackend`."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """The backend class."""
        return ConnectedTorchBackend


def _scaling(config: TrainerConfig, workers: Any) -> ScalingConfig:
    resources = {"CPU": config.ray.cores} | ({"GPU": 1} if config.ray.use_gpu else {})
    return ScalingConfig(
        num_workers=workers,
        use_gpu=config.ray.use_gpu,
        resources_per_worker=resources,
        placement_strategy="SPREAD" if config.ray.spread else "PACK",
    )


def _run(config: TrainerConfig, workers: Any) -> None:
    # Ray resumes runs by name: we use a new name each time, since we resume from our own checkpoints.
    run = RunFolder.of(config.output)
    store, storage = filesystem(f"{config.output.rstrip('/')}/.ray")
    with suppress(OSError):
        store.delete_dir(storage)
    failures: Any = {"max_failures": MAX_FAILURES, "controller_failure_limit": MAX_FAILURES}
    trainer = TorchTrainer(
        work,
        train_loop_config=config.to_dict(),
        scaling_config=_scaling(config, workers),
        torch_config=ConnectedTorchConfig(
            backend="nccl" if config.ray.use_gpu else "gloo", timeout_s=STEP_TIMEOUT_SECONDS
        ),
        run_config=RunConfig(
            name=f"{run.path.name}-{uuid.uuid4().hex[:8]}",
            storage_path=storage,
            storage_filesystem=store,
            failure_config=FailureConfig(**failures),
        ),
    )
    run.remove(FAILED)
    try:
        # Ray installed its own handler when it started.
        with on_sigterm(run), interrupted_plainly():
            trainer.fit()
        run.pull(checkpoints=False)
        with suppress(FileNotFoundError):
            raise InputError(**json.loads(read_file(f"{config.output.rstrip('/')}/{FAILED}")))
        if not is_finished(run.path):
            raise Stopped("stopped; the same command resumes from the checkpoint that was left")
    except (TrainingFailedError, RayActorError) as error:
        raise _explained(error, config) from None
    finally:
        with suppress(OSError):
            store.delete_dir(storage)


def _explained(error: Exception, config: TrainerConfig) -> Exception:
    """Translate a Ray Train error to one that the user can fix; bugs are returned unchanged."""
    if isinstance(error, TrainingFailedError) and os.strerror(errno.ENOSPC) in str(error):
        return InputError(f"room on the disk of {local_path(config.output)}", "a full disk", "free space, run again")
    if isinstance(error, RayActorError):  # the controller, which starts all workers
        cause = str(error).strip().splitlines()[0]
        again = "run again: it resumes from the latest checkpoint"
        return InputError("Ray Train's controller to stay alive", cause, again)
    if not isinstance(error, ControllerError):
        return error
    failure = error.controller_failure
    if isinstance(failure, InputError):
        return failure
    cause = str(failure).strip().splitlines()[0]
    return InputError(f"a cluster that can start {config.ray.workers} workers", cause, "add nodes, or run again later")


def work(settings: dict[str, Any]) -> None:
    """Entry point of each Ray worker: the same loop as without Ray.

    Errors common to all workers are not raised, since Ray would restart the workers.
    """
    config, world = from_dict(settings), World.from_process_group()
    try:
        train(config, world, lambda metrics: report(metrics))
    except Stopped:
        return
    except (InputError, NotFiniteError) as error:
        if world.is_first:
            reason = error if isinstance(error, InputError) else error.as_input_error()
            run = RunFolder.of(config.output)
            write_json(run.path / FAILED, vars(reason))
            run.send(FAILED)
