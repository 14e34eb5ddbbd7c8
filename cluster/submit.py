"""Job submission: runs a program on this machine, on a Spark cluster or on a Ray cluster.

`docs/cluster.md` has the equivalent plain commands; this adds packaging, environment, logs and exit status.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.child import dies_with_parent
from cluster.config import ClusterConfig, words
from cluster.pipeline import run_pipeline
from etl.engines.java import require_java
from etl.package import package
from etl.runtime.errors import InputError
from etl.runtime.options import OPENMP_SPIN_ENV
from etl.runtime.reachable import require_master
from trainer.ray_environment import environment, token_header

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"etl": "etl", "train": "trainer", "tune": "trainer.tune", "evaluate": "retrieval", "pipeline": "cluster"}
POLL_SECONDS = 1.0
UNREACHABLE_SECONDS = 120.0
"""Tolerated outage of a Ray cluster's head while following a job."""


def submit(config: ClusterConfig, options: list[str]) -> int:
    """Submit, follow to the end, and return the exit status.

    Args:
        config: what to submit, and the target.
        options: the command line; a pipeline on another machine gets its part of it.
    """
    if config.target == "local":
        return run(local_command(config, options))
    if config.target == "standalone":
        return submit_spark(config)
    return submit_ray(config, options)


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    """Run a command with its output shown; returns its exit status, 128 + N if signal N ended it.

    A SIGTERM is passed on: the command decides how to stop.
    """
    process = subprocess.Popen(dies_with_parent(command), env=env)
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        status = process.wait()
    except KeyboardInterrupt:  # it has got the interrupt too
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return status if status >= 0 else 128 - status


def pipeline_options(options: list[str]) -> list[str]:
    """The options of a command line that the pipeline or study reads."""
    return [o for o in options if o.partition("=")[0].partition(".")[0] in ("pipeline", "study")]


def local_command(config: ClusterConfig, options: list[str]) -> list[str]:
    """The command line of the program as a local process."""
    arguments = pipeline_options(options) if config.submit == "pipeline" else words("options", config.options)
    return [sys.executable, "-m", MODULES[config.submit or "pipeline"], *arguments]


def submit_spark(config: ClusterConfig) -> int:
    """Run the sessions job, or the first step of a pipeline, on a standalone Spark cluster.

    The secret of a cluster with `spark.authenticate` comes from `$SPARK_CONF_DIR/spark-defaults.conf`.
    """
    if config.submit == "pipeline":
        if config.python != "python":  # the interpreter of Spark's workers, if at another path
            os.environ["PYSPARK_PYTHON"] = config.python
        master = shlex.quote(f"spark.master={config.address}")
        print(run_pipeline(replace(config.pipeline, etl=f"{config.pipeline.etl} {master}")))
        return 0
    import pyspark

    require_java()
    require_master(str(config.address))
    home = Path(pyspark.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "nextclick.zip"
        package(archive)
        command = [str(home / "bin" / "spark-submit"), "--master", str(config.address)]
        command += ["--name", config.name, "--py-files", str(archive), str(ROOT / "cluster" / "etl_job.py")]
        worker = sys.executable if config.python == "python" else config.python
        env = os.environ | {"SPARK_HOME": str(home), "PYSPARK_PYTHON": worker, "PYSPARK_DRIVER_PYTHON": sys.executable}
        return run([*command, *words("options", config.options)], env)


def entrypoint(config: ClusterConfig, options: list[str]) -> str:
    """The command line on the Ray cluster's head."""
    if config.submit == "pipeline":
        return shlex.join([config.python, "-m", "cluster", *pipeline_options(options), "pipeline.on_ray=true"])
    module = "cluster.evaluate" if config.submit == "evaluate" else MODULES[config.submit or ""]
    return shlex.join([config.python, "-m", module, *words("options", config.options)])


def runtime_env(config: ClusterConfig) -> dict[str, Any]:
    """Ray runtime environment: the code as working directory (without `.rayignore` entries), and variables."""
    variables = {"PYTHONUNBUFFERED": "1", OPENMP_SPIN_ENV[0]: os.environ.get(*OPENMP_SPIN_ENV)}
    if config.interface:
        variables |= {"GLOO_SOCKET_IFNAME": config.interface, "NCCL_SOCKET_IFNAME": config.interface}
    env: dict[str, Any] = {"working_dir": str(ROOT), "env_vars": variables}
    if config.install:
        env["pip"] = str(ROOT / "requirements.lock")
    return env


def submit_ray(config: ClusterConfig, options: list[str]) -> int:
    """Submit a job to a Ray cluster and follow it to its end.

    The token is read from RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN. If a job is lost with its head, run the same command
    again: training resumes from its checkpoint, an evaluation with the missing parts.

    Raises:
        InputError: the cluster rejects the token or is unreachable.
    """
    client, identity = ray_client(config), f"{config.name}-{uuid.uuid4().hex[:8]}"
    deadline = time.monotonic() + UNREACHABLE_SECONDS
    while True:
        try:
            line, env = entrypoint(config, options), runtime_env(config)
            client.submit_job(entrypoint=line, submission_id=identity, runtime_env=env)
            break
        except Exception as error:
            if "try again" not in str(error) or time.monotonic() > deadline:
                raise refused(config, error) from None
            time.sleep(POLL_SECONDS)  # a newly started head has no agent yet
    print(f"job {identity} at {config.address}", file=sys.stderr, flush=True)
    return follow(client, identity)


def ray_client(config: ClusterConfig) -> Any:
    """A client of the cluster's job server."""
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # else it lists every file that it does not upload
    # Either variable would override the requested address.
    with environment(RAY_ADDRESS=None, RAY_API_SERVER_ADDRESS=None):
        try:
            return JobSubmissionClient(str(config.address), headers=token_header())
        except InputError:
            raise
        except Exception as error:
            raise refused(config, error) from None


def refused(config: ClusterConfig, error: Exception) -> InputError:
    """Why a cluster rejected a job, in one line."""
    text = " ".join(str(error).split())
    words = ("unauthorized", "status code 401", "status code 403", "forbidden", "authentication token")
    if any(word in text.lower() for word in words):
        hint = "set RAY_AUTH_TOKEN_PATH to the cluster's file"
        return InputError(f"a token that {config.address} accepts", text[:300], hint)
    return InputError(f"a Ray cluster at {config.address}", text[:200], "start it, or correct address=…")


def follow(client: Any, identity: str) -> int:
    """Print a job's log until the job has ended; returns its exit status.

    Polls log and status, since a log stream may end before the job.
    """
    shown, lost = 0, None
    while True:
        try:
            status = client.get_job_status(identity)
            text = client.get_job_logs(identity)
            lost = None
        except Exception as error:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > UNREACHABLE_SECONDS:
                raise InputError("the head of the Ray cluster", str(error)[:200], "submit again; it resumes") from None
            time.sleep(POLL_SECONDS)
            continue
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
        if status.is_terminal():
            break
        time.sleep(POLL_SECONDS)
    if str(status) == "SUCCEEDED":
        return 0
    info = client.get_job_info(identity)
    print(f"job {identity}: {status}: {info.message or ''}", file=sys.stderr, flush=True)
    return int(info.driver_exit_code or 1)
