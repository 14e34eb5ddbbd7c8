"""Ray Train around the loop: the only file that knows Ray."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, report
from ray.train.torch import TorchConfig, TorchTrainer

from trainer.config import TrainerConfig, from_plain
from trainer.loop import is_finished, train
from trainer.stop import Stopped, on_sigterm
from trainer.world import World

MAX_FAILURES = 3
COLLECTIVE_TIMEOUT_SECONDS = 300


def run_with_ray(config: TrainerConfig) -> None:
    """Train on Ray workers: of the cluster that RAY_ADDRESS names, else of one started here.

    A worker that dies makes Ray start the group again; it goes on from our own latest checkpoint.

    Raises:
        Stopped: the workers saved and ended, as SIGTERM to this process asks them to.
    """
    given = config.ray.workers
    workers: Any = tuple(given) if isinstance(given, list) else given
    most = workers[1] if isinstance(workers, tuple) else workers
    packages = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # A usage report would look beyond this machine.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        local = {
            "address": "local",
            "num_cpus": max(most, os.cpu_count() or 1),
            "include_dashboard": False,
        }
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    ray.init(
        runtime_env={"env_vars": {"PYTHONPATH": path, "RAY_TRAIN_V2_ENABLED": "1"}},
        logging_level=logging.ERROR,
        log_to_driver=False,
        **local,
    )
    # Ray resumes a run name that it knows: ours is new each time, since we resume by ourselves.
    storage = Path(config.output) / ".ray"
    shutil.rmtree(storage, ignore_errors=True)
    failures: Any = {"max_failures": MAX_FAILURES, "controller_failure_limit": MAX_FAILURES}
    trainer = TorchTrainer(
        work,
        train_loop_config=config.plain(),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=config.ray.use_gpu),
        torch_config=TorchConfig(
            backend="nccl" if config.ray.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_SECONDS
        ),
        run_config=RunConfig(
            name=f"{Path(config.output).name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage),
            failure_config=FailureConfig(**failures),
        ),
    )
    try:
        # Ray put a handler of its own in place when it started.
        with on_sigterm(Path(config.output)):
            trainer.fit()
        if not is_finished(Path(config.output)):
            raise Stopped("stopped; the same command goes on from the checkpoint that was left")
    finally:
        ray.shutdown()
        shutil.rmtree(storage, ignore_errors=True)


def work(settings: dict[str, Any]) -> None:
    """What each Ray worker does: the same loop as without Ray."""
    # Workers that were asked to stop have done what was asked: an error would start them again.
    with suppress(Stopped):
        train(from_plain(settings), World.of_process_group(), lambda metrics: report(metrics))
