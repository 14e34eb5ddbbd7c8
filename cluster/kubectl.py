"""Runs kubectl and spark-submit, and checks for running jobs of the same name."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from typing import Any

from etl.runtime.errors import InputError

ENDED = ("Complete", "Failed")
"""Final states of a Job (condition types) and of a RayJob (deployment status)."""


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    """Run a command with its output shown.

    Raises:
        InputError: it failed.
    """
    done = subprocess.run(command, env=os.environ | (env or {}), check=False)
    if done.returncode:
        raise InputError(f"{command[0]} to succeed", f"exit status {done.returncode}", "see its output above")


def remove_ended(job: dict[str, Any]) -> None:
    """Delete an ended job of the same name, since applying over it is refused, or never starts.

    Raises:
        InputError: a job of this name is still running.
    """
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    object_name = f"{job['kind'].lower()}/{name}"
    ask = ["kubectl", "get", object_name, f"--namespace={namespace}", "--ignore-not-found", "--output=json"]
    done = subprocess.run(ask, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError(f"an answer to {shlex.join(ask)}", f"exit status {done.returncode}", "see its output above")
    if not done.stdout.strip():
        return
    if not has_ended(json.loads(done.stdout)):
        raise InputError(
            f"no running {object_name}", "one", "wait for it, delete it with kubectl, or name another: name=…"
        )
    run(["kubectl", "delete", object_name, f"--namespace={namespace}", "--wait=true"])


def has_ended(job: dict[str, Any]) -> bool:
    """Whether a Job or RayJob (its Kubernetes object) has succeeded or failed."""
    status = job.get("status", {})
    conditions = [c["type"] for c in status.get("conditions", []) if c.get("status") == "True"]
    return any(state in ENDED for state in [*conditions, status.get("jobDeploymentStatus")])
