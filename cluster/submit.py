"""Job submission: runs a program on this machine, on a Spark cluster or on a Ray cluster.

The plain commands do the same and are in `docs/cluster.md`; this adds packaging, environment, logs and exit status.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.pipeline import run_pipeline
from etl.engines.java import require_java
from etl.package import package
from etl.runtime.errors import InputError
from etl.runtime.options import SPINS
from etl.runtime.reachable import require_master
from trainer.ray_environment import environment, token_header

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"etl": "etl", "train": "trainer", "tune": "trainer.tune", "evaluate": "retrieval", "pipeline": "cluster"}
POLL_SECONDS = 1.0
UNREACHABLE_SECONDS = 120.0
"""The head of a Ray cluster may be away for so long before following a job ends."""


def submit(config: ClusterConfig, options: list[str]) -> int:
    """Submit, follow to the end, and return the program's exit status.

    Args:
        config: what to submit, and where to.
        options: the command line, of which a pipeline on another machine gets the part that concerns it.
    """
    if config.target == "local":
        return run(local_command(config, options))
    if config.target == "standalone":
        return submit_spark(config)
    return submit_ray(config, options)


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    """Exit status of a command that shows its output here."""
    return subprocess.run(command, env=env, check=False).returncode


def pipeline_options(options: list[str]) -> list[str]:
    """Those options of a command line that describe the pipeline."""
    return [o for o in options if o.lstrip("+").startswith("pipeline")]


def local_command(config: ClusterConfig, options: list[str]) -> list[str]:
    """The program as a process of this machine."""
    arguments = pipeline_options(options) if config.submit == "pipeline" else shlex.split(config.options)
    return [sys.executable, "-m", MODULES[config.submit or "pipeline"], *arguments]


def submit_spark(config: ClusterConfig) -> int:
    """The sessions job on a standalone cluster; of a pipeline its first step.

    The secret of a cluster with `spark.authenticate` comes from `$SPARK_CONF_DIR/spark-defaults.conf`.
    """
    if config.submit == "pipeline":
        if config.python != "python":  # the interpreter of Spark's workers, which may lie elsewhere than this one
            os.environ["PYSPARK_PYTHON"] = config.python
        master = f'spark.master="{config.address}"'
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
        return run([*command, *shlex.split(config.options)], env)


def entrypoint(config: ClusterConfig, options: list[str]) -> str:
    """The command line on the Ray cluster's head."""
    if config.submit == "pipeline":
        return shlex.join([config.python, "-m", "cluster", *pipeline_options(options), "pipeline.on_ray=true"])
    module = "cluster.evaluate" if config.submit == "evaluate" else MODULES[config.submit or ""]
    return shlex.join([config.python, "-m", module, *shlex.split(config.options)])


def runtime_env(config: ClusterConfig) -> dict[str, Any]:
    """The code as a working directory (what `.rayignore` names stays here), and the environment."""
    variables = {"PYTHONUNBUFFERED": "1", SPINS[0]: os.environ.get(*SPINS)}
    if config.interface:
        variables |= {"GLOO_SOCKET_IFNAME": config.interface, "NCCL_SOCKET_IFNAME": config.interface}
    env: dict[str, Any] = {"working_dir": str(ROOT), "env_vars": variables}
    if config.install:
        env["pip"] = str(ROOT / "requirements.lock")
    return env


def submit_ray(config: ClusterConfig, options: list[str]) -> int:
    """A job of a Ray cluster, followed to its end.

    Its token is read from RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN. A job that was lost with its head is submitted again
    by the same command: training resumes from its checkpoint, an evaluation with the parts that are left.

    Raises:
        InputError: the cluster refuses the token, or cannot be reached.
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
            time.sleep(POLL_SECONDS)  # a head that has just started has no agent yet
    print(f"job {identity} at {config.address}", file=sys.stderr, flush=True)
    return follow(client, identity)


def ray_client(config: ClusterConfig) -> Any:
    """A client of the cluster's job server."""
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # or it lists every file that it does not upload
    # Either variable would win over the address that was asked for.
    with environment(RAY_ADDRESS=None, RAY_API_SERVER_ADDRESS=None):
        try:
            return JobSubmissionClient(str(config.address), headers=token_header())
        except InputError:
            raise
        except Exception as error:
            raise refused(config, error) from None


def refused(config: ClusterConfig, error: Exception) -> InputError:
    """Why a cluster did not take a job, in one line."""
    text = " ".join(str(error).split())
    words = ("unauthorized", "status code 401", "status code 403", "forbidden", "authentication token")
    if any(word in text.lower() for word in words):
        hint = "set RAY_AUTH_TOKEN_PATH to the cluster's file"
        return InputError(f"a token that {config.address} accepts", text[:300], hint)
    return InputError(f"a Ray cluster at {config.address}", text[:200], "start it, or correct address=…")


def follow(client: Any, identity: str) -> int:
    """Print a job's log as it grows until the job has ended; its exit status.

    Log and status are asked for again and again: a log that is streamed may stop before the job does.
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
