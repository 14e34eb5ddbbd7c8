"""Kubernetes manifests from typed values: training as a RayJob, evaluation as a Job, network policies.

They are written to a folder, and `python -m cluster submit=… target=kubernetes` applies them if kubectl is installed.
The sessions job uses `spark-submit --master k8s://…` with the same image.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ClusterConfig, KubernetesOptions, words
from cluster.kubectl import remove_ended, run
from cluster.pods import CONTAINER_SECURITY, LABEL, container, labels, literal, pod, spark_template
from cluster.submit import entrypoint

OPERATOR = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
"""Selects KubeRay's operator in any namespace, by the label of its chart."""
STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
"""Keys of the object store's secret."""
POLICY, SPARK_TEMPLATE, SPARK_CONTAINER = "network-policy.yaml", "spark-pod.yaml", "spark"


def metadata(name: str, options: KubernetesOptions) -> dict[str, Any]:
    """Name, namespace and labels of a job."""
    return {"name": name, "namespace": options.namespace, "labels": labels(options)}


def worker_range(options: KubernetesOptions) -> tuple[int, int]:
    """Minimum and maximum training workers; with a queue both are the minimum, which is admitted as a unit."""
    minimum, maximum = options.workers
    return (minimum, minimum) if options.queue else (minimum, maximum)


def worker_options(options: KubernetesOptions) -> list[str]:
    """Trainer options derived from the manifest: workers, their GPUs and cores."""
    minimum, maximum = worker_range(options)
    workers = str(minimum) if minimum == maximum else f"[{minimum},{maximum}]"
    gpus = "true" if options.gpus else "false"
    return [f"ray.workers={workers}", f"ray.use_gpu={gpus}", f"ray.cores={options.cpus}"]


def missing(defaults: list[str], explicit: list[str]) -> list[str]:
    """The `defaults` whose names are not among the explicit options."""
    names = {option.partition("=")[0] for option in explicit}
    return [option for option in defaults if option.partition("=")[0] not in names]


def with_worker_options(config: ClusterConfig, options: list[str]) -> tuple[ClusterConfig, list[str]]:
    """Add the trainer options derived from the manifest to configuration and command line; explicit ones win.

    They come first, so that options in an `@FILE` win too.
    """
    defaults = worker_options(config.kubernetes)
    if config.submit == "train":
        more = missing(defaults, words("options", config.options))
        return replace(config, options=" ".join([*more, config.options]).strip()), options
    arguments = config.pipeline.trainer
    trainer = " ".join([*missing(defaults, words("pipeline.trainer", arguments)), arguments]).strip()
    others = [o for o in options if o.partition("=")[0] != "pipeline.trainer"]
    return config, [*others, f"pipeline.trainer={trainer}"]


def ray_job(config: ClusterConfig, options: list[str]) -> dict[str, Any]:
    """A RayJob (KubeRay, ray.io/v1) that creates its cluster, runs, and deletes the cluster.

    KubeRay passes the secret's token to all pods and uses it to poll the job's status (`authOptions`).
    """
    values = config.kubernetes
    minimum, maximum = worker_range(values)
    config, options = with_worker_options(config, options)
    resources = {"cpu": str(values.cpus), "memory": f"{values.memory_gib}Gi"}
    if values.gpus:
        resources["nvidia.com/gpu"] = str(values.gpus)
    env = [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]
    head = container("ray-head", values, {"cpu": "2", "memory": "8Gi"}, env=env)
    head["ports"] = [{"name": "gcs", "containerPort": 6379}, {"name": "dashboard", "containerPort": 8265}]
    worker = container("ray-worker", values, resources, env=env)
    # Our template for the submitter pod adds the label that the network policy selects.
    submitter = container("ray-job-submitter", values, {"cpu": "500m", "memory": "1Gi"})
    group = {
        "groupName": "training",
        "replicas": minimum,
        "minReplicas": minimum,
        "maxReplicas": maximum,
        "rayStartParams": {},
        "template": pod(worker, values),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(f"{config.name}-{config.submit}", values),
        "spec": {
            # KubeRay makes this an argument of the submitter's container.
            "entrypoint": literal([entrypoint(config, options)])[0],
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": 3,  # a retry resumes from the checkpoint
            "submitterPodTemplate": pod(submitter, values, restartPolicy="Never"),
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token", "secretName": values.token_secret},
                "enableInTreeAutoscaling": minimum != maximum,
                "autoscalerOptions": {"securityContext": dict(CONTAINER_SECURITY)},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    # The autoscaler next to the head requests workers with the service account created by KubeRay.
                    "template": pod(head, values, automountServiceAccountToken=None),
                },
                "workerGroupSpecs": [group],
            },
        },
    }


def evaluation_job(config: ClusterConfig) -> dict[str, Any]:
    """Evaluation on one machine as a Job; if killed, it resumes with the missing parts."""
    values = config.kubernetes
    command = literal(["python", "-m", "retrieval", *words("options", config.options)])
    resources = {"cpu": str(values.cpus), "memory": f"{values.memory_gib}Gi"}
    template = pod(container("retrieval", values, resources, command=command), values, restartPolicy="OnFailure")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(f"{config.name}-evaluate", values),
        "spec": {"backoffLimit": 3, "ttlSecondsAfterFinished": 86_400, "template": template},
    }


def network_policy(options: KubernetesOptions) -> dict[str, Any]:
    """Allows traffic only between our pods, and from KubeRay to the head: gloo and NCCL have no authentication."""
    ours = [{"podSelector": {"matchLabels": dict(LABEL)}}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "nextclick-closed", "namespace": options.namespace, "labels": dict(LABEL)},
        "spec": {
            "podSelector": {"matchLabels": dict(LABEL)},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": ours}, {"from": [OPERATOR], "ports": [{"port": 8265, "protocol": "TCP"}]}],
        },
    }


def spark_command(config: ClusterConfig, folder: Path) -> list[str]:
    """`spark-submit` of the sessions job; driver and executors run in our image with the shared storage.

    Args:
        config: what to submit.
        folder: folder of `spark-pod.yaml`.
    """
    values = config.kubernetes
    volume = "spark.kubernetes.{}.volumes.persistentVolumeClaim.shared.{}"
    settings = {
        "spark.kubernetes.container.image": values.image,
        "spark.kubernetes.namespace": values.namespace,
        "spark.kubernetes.authenticate.driver.serviceAccountName": values.service_account,
        "spark.executor.instances": str(values.workers[1]),
        "spark.executor.cores": str(values.cpus),
        # The Java heap: the work is done by Python processes beside it, which need the other half.
        "spark.executor.memory": f"{max(1, values.memory_gib // 2)}g",
        "spark.authenticate": "true",  # on Kubernetes Spark generates the secret
        "spark.network.crypto.enabled": "true",
        "spark.ui.enabled": "false",
    }
    if values.pull_secret:
        settings["spark.kubernetes.container.image.pullSecrets"] = values.pull_secret
    for part in ("driver", "executor"):
        settings[f"spark.kubernetes.{part}.podTemplateFile"] = str(folder / SPARK_TEMPLATE)
        settings[f"spark.kubernetes.{part}.podTemplateContainerName"] = SPARK_CONTAINER
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
    return [*command, *literal(words("options", config.options))]


def manifests(config: ClusterConfig, options: list[str]) -> dict[str, dict[str, Any]]:
    """Kubernetes objects by file name."""
    result = {POLICY: network_policy(config.kubernetes)}
    if config.submit == "evaluate":
        result["evaluate.yaml"] = evaluation_job(config)
    elif config.submit in ("train", "pipeline"):
        result[f"{config.submit}.yaml"] = ray_job(config, options)
    else:
        result[SPARK_TEMPLATE] = spark_template(SPARK_CONTAINER, config.kubernetes)
    return result


def submit(config: ClusterConfig, options: list[str]) -> list[str]:
    """Write the manifests and apply them; the sessions job uses spark-submit.

    Args:
        config: what to submit.
        options: the command line; a pipeline gets its part of it.

    Returns:
        The files, and the remaining steps.

    Raises:
        InputError: a job of this name is running, or kubectl or spark-submit failed.
    """
    folder = Path(config.kubernetes.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    objects = manifests(config, options)
    for name, value in objects.items():
        (folder / name).write_text(yaml.safe_dump(value, sort_keys=False))
    files = [str(folder / name) for name in objects]
    # Spark itself creates its pods from the template.
    apply = ["kubectl", "apply", *(f"--filename={file}" for file in files if not file.endswith(SPARK_TEMPLATE))]
    spark = spark_command(config, folder) if config.submit == "etl" else None
    commands = [shlex.join(command) for command in (apply, spark) if command]
    if not config.kubernetes.apply:
        return [*files, "kubernetes.apply=false, so nothing was applied; the commands are:", *commands]
    if shutil.which("kubectl") is None:
        return [*files, "no kubectl here, so nothing was applied; the commands are:", *commands]
    if spark and config.address is None:
        return [*files, "without address=https://HOST:6443 nothing was applied; the commands are:", *commands]
    for value in objects.values():
        if value["kind"] in ("Job", "RayJob"):
            remove_ended(value)
    run(apply)
    if spark:
        import pyspark

        home = Path(pyspark.__file__).parent
        run([str(home / "bin" / spark[0]), *spark[1:]], {"SPARK_HOME": str(home)})
    return files
