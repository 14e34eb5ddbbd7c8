"""Pod specifications: Pod Security level "restricted", shared volumes, node selectors and tolerations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.config import KubernetesOptions

LABEL = {"app.kubernetes.io/part-of": "nextclick"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
USER = 1000
"""User id of the image, not root."""
GRACE_SECONDS = 120
"""Grace period to save a checkpoint before a pod is killed."""
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def labels(options: KubernetesOptions) -> dict[str, str]:
    """The label that the network policy selects, and the job's Kueue queue."""
    return {**LABEL, QUEUE_LABEL: options.queue} if options.queue else dict(LABEL)


def literal(arguments: Sequence[str]) -> list[str]:
    """Escape container arguments for Kubernetes, which expands `$(NAME)` and reads `$$` as `$`.

    >>> literal(["a=$(b)", "c"])
    ['a=$$(b)', 'c']
    """
    return [argument.replace("$", "$$") for argument in arguments]


def tolerations(text: str) -> list[dict[str, str]]:
    """Parse tolerations in the syntax of `kubectl taint`, separated by spaces.

    >>> tolerations("nvidia.com/gpu:NoSchedule team=ml:NoExecute")[1]
    {'key': 'team', 'operator': 'Equal', 'value': 'ml', 'effect': 'NoExecute'}
    """
    result = []
    for taint in text.split():
        name, _, effect = taint.partition(":")
        key, equals, value = name.partition("=")
        entry = {"key": key, "operator": "Equal", "value": value} if equals else {"key": key, "operator": "Exists"}
        result.append(entry | ({"effect": effect} if effect else {}))
    return result


def node_selector(text: str) -> dict[str, str]:
    """Parse node labels, `NAME=VALUE` separated by spaces.

    >>> node_selector("zone=a disk=ssd")
    {'zone': 'a', 'disk': 'ssd'}
    """
    pairs = (entry.partition("=") for entry in text.split())
    return {name: value for name, _, value in pairs}


def scheduling(options: KubernetesOptions) -> dict[str, Any]:
    """Scheduling part of a pod specification: node selector, tolerations, and image pull secret."""
    fields = {
        "nodeSelector": node_selector(options.node_selector),
        "tolerations": tolerations(options.tolerations),
        "imagePullSecrets": [{"name": options.pull_secret}] if options.pull_secret else [],
    }
    return {name: value for name, value in fields.items() if value}


def container(
    name: str, options: KubernetesOptions, resources: dict[str, Any], *, env: Sequence[Any] = (), **more: Any
) -> dict[str, Any]:
    """A container of our image with the shared storage."""
    from etl.runtime.object_store import CACHE

    if options.store_secret:
        more["envFrom"] = [{"secretRef": {"name": options.store_secret}}]
    return {
        "name": name,
        "image": options.image,
        "env": [*env, {"name": CACHE, "value": f"{options.mount}/cache"}],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": dict(CONTAINER_SECURITY),
        "volumeMounts": [{"name": "shared", "mountPath": options.mount}, {"name": "memory", "mountPath": "/dev/shm"}],
        **more,
    }


def pod(spec: dict[str, Any], options: KubernetesOptions, **more: Any) -> dict[str, Any]:
    """A pod of one container, as non-root user; `more` adds to its specification, None removes entries."""
    claimed = {"persistentVolumeClaim": {"claimName": options.claim}} if options.claim else {"emptyDir": {}}
    volumes = [
        {"name": "shared", **claimed},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
    pod_spec: dict[str, Any] = {"containers": [spec], "volumes": volumes, "securityContext": dict(POD_SECURITY)}
    pod_spec |= scheduling(options)
    pod_spec |= {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": GRACE_SECONDS, **more}
    pod_spec = {name: value for name, value in pod_spec.items() if value is not None}
    return {"metadata": {"labels": dict(LABEL)}, "spec": pod_spec}


def spark_template(name: str, options: KubernetesOptions) -> dict[str, Any]:
    """Pod template for Spark's driver and executors; Spark adds image, volumes and resources."""
    spec = {"containers": [{"name": name, "securityContext": dict(CONTAINER_SECURITY)}]}
    metadata = {"labels": labels(options)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {**spec, "securityContext": dict(POD_SECURITY), **scheduling(options)},
    }
