"""Kubernetes manifests, Spark's command on Kubernetes, and the image's entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pyspark
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from cluster.__main__ import main
from cluster.config import load
from cluster.kubernetes import manifests, spark_command
from etl.engines.java import OLDEST_JAVA, java_version
from etl.package import package
from tests.support.logs import generated_log

ROOT = Path(__file__).parents[2]
VERSION = "1.34"


def rendered(what: str, *more: str) -> dict:
    options = [f"submit={what}", "target=kubernetes", "options=data=/shared/d output=/shared/r model=hybrid", *more]
    return manifests(load(options), options)


STORE = ["kubernetes.claim=null", "kubernetes.store_secret=store"]


@pytest.mark.parametrize("what", ["etl", "train", "evaluate", "pipeline"])
@pytest.mark.parametrize("more", [[], ["kubernetes.gpus=0", "kubernetes.workers=[1,64]"], STORE[1:]])
def test_manifests_are_valid(what, more):
    actual = rendered(what, *more)
    for name, value in actual.items():
        assert yaml.safe_load(yaml.safe_dump(value)) == value
        if value["kind"] != "RayJob":
            kubernetes_validate.validate(value, VERSION, strict=True)
            continue
        for template in ray_pods(value):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            pod["metadata"] = {**pod["metadata"], "name": name.removesuffix(".yaml")}
            kubernetes_validate.validate(pod, VERSION, strict=True)


def ray_pods(job: dict) -> list[dict]:
    """Pod templates of the head, the workers and the submitter."""
    spec = job["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [*(group["template"] for group in groups), job["spec"]["submitterPodTemplate"]]


def pods(rendered_files: dict) -> list[dict]:
    templates = [v["spec"]["template"] for v in rendered_files.values() if v["kind"] == "Job"]
    for value in rendered_files.values():
        if value["kind"] == "RayJob":
            templates += ray_pods(value)
    return templates


@pytest.mark.parametrize("what", ["train", "evaluate", "pipeline"])
def test_pods_are_isolated_run_as_non_root_and_contain_no_secret(what):
    actual = rendered(what)
    chosen = actual["network-policy.yaml"]["spec"]["podSelector"]["matchLabels"]
    ours, operator = actual["network-policy.yaml"]["spec"]["ingress"]
    assert ours == {"from": [{"podSelector": {"matchLabels": chosen}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert pods(actual)
    for pod in pods(actual):
        assert pod["metadata"]["labels"] == chosen
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        for container in pod["spec"]["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert not any("TOKEN" in entry["name"] for entry in container.get("env", []))


def test_ray_job_is_elastic_and_shuts_its_cluster_down():
    spec = rendered("train", "kubernetes.workers=[2,9]")["train.yaml"]["spec"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 2, 9)
    assert spec["shutdownAfterJobFinishes"]
    settled = "'ray.workers=[2,9]' ray.use_gpu=true ray.cores=8"
    assert spec["entrypoint"] == f"python -m trainer {settled} data=/shared/d output=/shared/r model=hybrid"
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "ray-token"}


def test_rays_own_parser_reads_the_intended_workers_and_resources():
    """Parsed by Ray's own autoscaler, which reads these specifications on Kubernetes."""
    job = rendered("train", "kubernetes.workers=[2,9]", "kubernetes.cpus=6", "kubernetes.memory_gib=24")["train.yaml"]
    read = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "n", "namespace": "s"}, "spec": job["spec"]["rayClusterSpec"]}
    )
    kinds = read["available_node_types"]
    head, worker = kinds[read["head_node_type"]], kinds["training"]
    assert (worker["min_workers"], worker["max_workers"], head["max_workers"]) == (2, 9, 0)
    assert worker["resources"] == {"CPU": 6, "GPU": 1, "memory": 24 << 30}
    assert head["resources"]["CPU"] == 0
    account = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "automountServiceAccountToken" not in account  # Ray's autoscaler reads the account's token there


def test_store_keys_come_only_from_its_secret():
    pod = rendered("evaluate", *STORE)["evaluate.yaml"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert {"name": "shared", "emptyDir": {}} in pod["volumes"]
    etl = load(["submit=etl", "target=kubernetes", "kubernetes.store_secret=store"])
    line = " ".join(spark_command(etl, Path("/k")))
    for part in ("driver", "executor"):
        assert f"spark.kubernetes.{part}.secretKeyRef.AWS_SECRET_ACCESS_KEY=store:AWS_SECRET_ACCESS_KEY" in line


def test_spark_on_kubernetes_mounts_the_shared_storage_and_authenticates():
    options = [
        "submit=etl",
        "target=kubernetes",
        "address=https://h:6443",
        "options=input=/shared/a.csv output=/shared/d",
        "kubernetes.memory_gib=25",
    ]
    line = " ".join(spark_command(load(options), Path("/k")))
    assert "--master k8s://https://h:6443 --deploy-mode cluster" in line
    assert "spark.authenticate=true" in line
    assert "spark.executor.memory=12g" in line  # the other half is for Python
    for part in ("driver", "executor"):
        assert f"spark.kubernetes.{part}.volumes.persistentVolumeClaim.shared.mount.path=/shared" in line
    assert line.endswith("local:///app/cluster/etl_job.py input=/shared/a.csv output=/shared/d")


ROLES = {
    "SPARK_JAVA_OPT_0": "-Da=1",
    "SPARK_JAVA_OPT_10": "-Dc=3",
    "SPARK_JAVA_OPT_2": "-Db=two words",
    "SPARK_EXECUTOR_MEMORY": "2g",
    "SPARK_DRIVER_URL": "spark://d:1",
    "SPARK_EXECUTOR_ID": "7",
    "SPARK_EXECUTOR_CORES": "3",
    "SPARK_APPLICATION_ID": "app",
    "SPARK_EXECUTOR_POD_IP": "10.0.0.9",
    "SPARK_EXECUTOR_POD_NAME": "pod-7",
    "SPARK_RESOURCE_PROFILE_ID": "0",
    "SPARK_DRIVER_BIND_ADDRESS": "127.0.0.1",
}
"""Variables that Spark sets in its pods (`org.apache.spark.deploy.k8s.Constants`)."""


@pytest.mark.spark
@pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer")
def test_image_entrypoint_starts_spark_driver_and_executor(tmp_path):
    """As Spark on Kubernetes starts them: the driver with a properties file, executors by variables only."""
    log, data = generated_log(tmp_path / "log.csv", users=40, items=30, seed=3), tmp_path / "data"
    package(tmp_path / "nextclick.zip")
    (tmp_path / "spark.properties").write_text(
        f"spark.master local[1]\nspark.submit.pyFiles {tmp_path}/nextclick.zip\n"
    )
    home = Path(pyspark.__file__).parent
    env = os.environ | ROLES | {"SPARK_HOME": str(home), "PYSPARK_PYTHON": sys.executable}
    entry = [str(ROOT / "cluster" / "entrypoint.sh")]
    driver = ["driver", "--properties-file", str(tmp_path / "spark.properties")]
    driver += ["--class", "org.apache.spark.deploy.PythonRunner", str(ROOT / "cluster" / "etl_job.py")]
    etl = [f"input={log}", f"output={data}", "scenario=qb_video", "shards=2"]
    subprocess.run([*entry, *driver, *etl], cwd=tmp_path, env=env, check=True, timeout=200)
    assert (data / "manifest.json").is_file()

    fake = tmp_path / "bin" / "java"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    message = subprocess.run(
        [*entry, "executor"], env=env | {"JAVA_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    line = message.stdout.splitlines()
    assert line[:5] == ["-Da=1", "-Db=two words", "-Dc=3", "-Xms2g", "-Xmx2g"]
    assert "org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend" in line
    options = dict(zip(line[-14::2], line[-13::2], strict=True))
    assert options["--driver-url"] == "spark://d:1"
    assert (options["--podName"], options["--cores"], options["--hostname"]) == ("pod-7", "3", "10.0.0.9")
    plain = subprocess.run([*entry, "echo", "a b"], env=env, capture_output=True, text=True)
    assert plain.stdout == "a b\n"


def test_without_kubectl_manifests_are_written_and_the_command_is_printed(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    out = f"kubernetes.output={tmp_path / 'k'}"
    assert main(["submit=evaluate", "target=kubernetes", "options=bundle=b data=d output=o", out]) == 0
    assert f"kubectl apply --filename={tmp_path / 'k'}/network-policy.yaml" in capfd.readouterr().out
    assert {p.name for p in (tmp_path / "k").iterdir()} == {"network-policy.yaml", "evaluate.yaml"}
