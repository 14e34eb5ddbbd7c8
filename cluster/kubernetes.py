"""Kubernetes manifests from typed values: training as a RayJob, evaluation as a Job, who may talk to whom.

`kubectl apply -f FOLDER` starts them; where there is a kubectl, `python -m cluster submit=… target=kubernetes` does it.
Sessions go through `spark-submit --master k8s://…` with the same image.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ClusterConfig, KubernetesOptions
from cluster.submit import entrypoint
from etl.folder import InputError

LABEL = {"app.kubernetes.io/part-of": "nextclick"}
OPERATOR = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
"""KubeRay's operator, wherever it runs, by the label of its chart."""
USER = 1000
"""The image's user, who is not root."""
STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
"""What the store's secret holds."""
GRACE_SECONDS = 120
"""Time to save a checkpoint before a pod is killed."""


def metadata(name: str, options: KubernetesOptions) -> dict[str, Any]:
    """Name, namespace and the label that the network policy goes by."""
    return {"name": name, "namespace": options.namespace, "labels": dict(LABEL)}


def container(
    name: str, options: KubernetesOptions, resources: dict[str, Any], *, env: Sequence[Any] = (), **more: Any
) -> dict[str, Any]:
    """A container of our image with the shared storage."""
    from etl.remote import CACHE  # pyarrow with it, which nothing else here needs

    if options.store_secret:
        more["envFrom"] = [{"secretRef": {"name": options.store_secret}}]
    return {
        "name": name,
        "image": options.image,
        "env": [*env, {"name": CACHE, "value": f"{options.mount}/cache"}],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "shared", "mountPath": options.mount}, {"name": "memory", "mountPath": "/dev/shm"}],
        **more,
    }


def pod(spec: dict[str, Any], options: KubernetesOptions, **more: Any) -> dict[str, Any]:
    """A pod of one container, as a user who is not root; `more` adds to its specification, None takes away."""
    claimed = {"persistentVolumeClaim": {"claimName": options.claim}} if options.claim else {"emptyDir": {}}
    volumes = [
        {"name": "shared", **claimed},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
    security: dict[str, Any] = {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    pod_spec: dict[str, Any] = {"containers": [spec], "volumes": volumes, "securityContext": security}
    pod_spec |= {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": GRACE_SECONDS, **more}
    pod_spec = {name: value for name, value in pod_spec.items() if value is not None}
    return {"metadata": {"labels": dict(LABEL)}, "spec": pod_spec}


def ray_job(config: ClusterConfig, options: list[str]) -> dict[str, Any]:
    """A RayJob (KubeRay, ray.io/v1) that makes its cluster, runs, and takes the cluster down.

    KubeRay hands the secret's token to all pods and uses it itself to ask how the job is doing (`authOptions`).
    """
    values = config.kubernetes
    least, most = values.workers
    resources = {"cpu": str(values.cpus), "memory": f"{values.memory_gib}Gi"}
    if values.gpus:
        resources["nvidia.com/gpu"] = str(values.gpus)
    env = [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]
    head = container("ray-head", values, {"cpu": "2", "memory": "8Gi"}, env=env)
    head["ports"] = [{"name": "gcs", "containerPort": 6379}, {"name": "dashboard", "containerPort": 8265}]
    worker = container("ray-worker", values, resources, env=env)
    # Without a template of ours the pod that submits would not carry the label that the network policy goes by.
    submitter = container("ray-job-submitter", values, {"cpu": "500m", "memory": "1Gi"})
    groups = {
        "groupName": "training",
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": pod(worker, values),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(f"{config.name}-{config.submit}", values),
        "spec": {
            "entrypoint": entrypoint(config, options),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": 3,  # another try resumes from the checkpoint
            "submitterPodTemplate": pod(submitter, values, restartPolicy="Never"),
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token", "secretName": values.token_secret},
                "enableInTreeAutoscaling": True,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    # The autoscaler beside the head asks Kubernetes for workers as the account that KubeRay makes.
                    "template": pod(head, values, automountServiceAccountToken=None),
                },
                "workerGroupSpecs": [groups],
            },
        },
    }


def evaluation_job(config: ClusterConfig) -> dict[str, Any]:
    """Evaluation on one machine as a Job; killed, it goes on with the parts that are left."""
    values = config.kubernetes
    command = ["python", "-m", "retrieval", *shlex.split(config.options)]
    resources = {"cpu": str(values.cpus), "memory": f"{values.memory_gib}Gi"}
    template = pod(container("retrieval", values, resources, command=command), values, restartPolicy="OnFailure")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(f"{config.name}-evaluate", values),
        "spec": {"backoffLimit": 3, "ttlSecondsAfterFinished": 86_400, "template": template},
    }


def network_policy(options: KubernetesOptions) -> dict[str, Any]:
    """Our pods hear each other, and KubeRay asks the head about the job: gloo and NCCL know no authentication."""
    ours = [{"podSelector": {"matchLabels": dict(LABEL)}}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata("nextclick-closed", options),
        "spec": {
            "podSelector": {"matchLabels": dict(LABEL)},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": ours}, {"from": [OPERATOR], "ports": [{"port": 8265, "protocol": "TCP"}]}],
        },
    }


def spark_command(config: ClusterConfig) -> list[str]:
    """`spark-submit` of the sessions job; driver and executors run in our image and see the shared storage."""
    values = config.kubernetes
    volume = "spark.kubernetes.{}.volumes.persistentVolumeClaim.shared.{}"
    settings = {
        "spark.kubernetes.container.image": values.image,
        "spark.kubernetes.namespace": values.namespace,
        "spark.kubernetes.authenticate.driver.serviceAccountName": values.service_account,
        "spark.executor.instances": str(values.workers[1]),
        "spark.executor.cores": str(values.cpus),
        "spark.executor.memory": f"{max(1, values.memory_gib // 2)}g",
        "spark.authenticate": "true",  # on Kubernetes Spark makes the secret itself
        "spark.network.crypto.enabled": "true",
    }
    for part in ("driver", "executor"):
        if values.claim:
            settings[volume.format(part, "mount.path")] = values.mount
            settings[volume.format(part, "options.claimName")] = values.claim
        for name in STORE_KEYS if values.store_secret else ():
            settings[f"spark.kubernetes.{part}.secretKeyRef.{name}"] = f"{values.store_secret}:{name}"
        settings |= {f"spark.kubernetes.{part}.label.{name}": value for name, value in LABEL.items()}
    command = ["spark-submit", "--master", f"k8s://{config.address or 'https://HOST:6443'}", "--deploy-mode", "cluster"]
    for name, value in settings.items():
        command += ["--conf", f"{name}={value}"]
    command += ["--py-files", "local:///app/nextclick.zip", "local:///app/cluster/etl_job.py"]
    return [*command, *shlex.split(config.options)]


def manifests(config: ClusterConfig, options: list[str]) -> dict[str, dict[str, Any]]:
    """Objects by file name."""
    found = {"network-policy.yaml": network_policy(config.kubernetes)}
    if config.submit == "evaluate":
        found["evaluate.yaml"] = evaluation_job(config)
    elif config.submit in ("train", "pipeline"):
        found[f"{config.submit}.yaml"] = ray_job(config, options)
    return found


def submit(config: ClusterConfig, options: list[str]) -> list[str]:
    """Write the manifests and apply them; sessions go through spark-submit.

    Args:
        config: what to submit.
        options: the command line, of which a pipeline gets the part that concerns it.

    Raises:
        InputError: kubectl or spark-submit failed.
    """
    folder = Path(config.kubernetes.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, value in manifests(config, options).items():
        (folder / name).write_text(yaml.safe_dump(value, sort_keys=False))
        lines.append(str(folder / name))
    if config.submit == "etl":
        command = spark_command(config)
        if config.address is None:
            return [
                *lines,
                "without address=https://HOST:6443 nothing was submitted; the command is:",
                shlex.join(command),
            ]
        import pyspark

        command[0] = str(Path(pyspark.__file__).parent / "bin" / command[0])
    elif shutil.which("kubectl") is None:
        return [*lines, f"no kubectl here: kubectl apply -f {folder}"]
    else:
        command = ["kubectl", "apply", "-f", str(folder)]
    done = subprocess.run(command, env=dict(os.environ), check=False)
    if done.returncode:
        raise InputError(f"{command[0]} to end well", f"exit status {done.returncode}", "mend what it says above")
    return lines
