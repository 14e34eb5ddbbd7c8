"""Submitting: what is started where, wrong options, Kubernetes manifests, a cluster of several processes."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import stat
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from subprocess import Popen

import kubernetes_validate
import psutil
import pyspark
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from cluster import submit as submitting
from cluster.__main__ import main
from cluster.config import load
from cluster.kubernetes import manifests, spark_command
from etl.engines.java import OLDEST_JAVA, java_version
from etl.package import package
from tests.support.logs import generated_log
from tests.trainer.test_run import SMALL

ROOT = Path(__file__).parents[2]
VERSION = "1.34"


def test_options_of_options_need_no_quotes():
    options = 'options=data=d model=hybrid tasks=[next,like] spark.master="local[1]"'
    config = load(["submit=train", options])
    assert shlex.split(config.options, posix=False) == [
        "data=d",
        "model=hybrid",
        "tasks=[next,like]",
        'spark.master="local[1]"',
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        ["submit=bake"],
        ["target=moon", "submit=etl"],
        ["action=dance"],
        ["submit=train", "action=up"],
        ["submit=train", "target=standalone", "address=spark://h:7077"],
        ["submit=train", "target=ray"],
        ["submit=etl", "target=standalone"],
        ["local.nodes=0", "action=up"],
        ["kubernetes.workers=[3,1]", "submit=train", "target=kubernetes"],
        ["kubernetes.claim=null", "submit=etl", "target=kubernetes"],
        ["action=status", "local.state=/nowhere"],
        ["submit=train", "target=ray", "address=http://127.0.0.1:1"],
    ],
)
def test_wrong_options_end_with_one_plain_line(wrong, capfd):
    assert main(wrong) == 2
    err = capfd.readouterr().err
    assert err.strip().splitlines()[-1].startswith("error: expected ")
    assert "Traceback" not in err


def test_a_program_submitted_to_this_machine_is_that_program(fifty, tmp_path):
    small = " ".join(SMALL)
    run = tmp_path / "run"
    options = f"options=data={fifty.path} output={run} model=gru4rec {small} train.epochs=1"
    assert main(["submit=train", options]) == 0
    assert main(["submit=evaluate", f"options=bundle={run / 'bundle'} data={fifty.path} output={tmp_path / 'r'}"]) == 0
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["model"] == "gru4rec"
    with pytest.raises(SystemExit) as left:
        main(["submit=train", "options=data=/nowhere output=x model=gru4rec"])
    assert left.value.code == 2


def test_the_package_holds_the_whole_of_etl_and_nothing_else(tmp_path):
    package(tmp_path / "a.zip")
    names = zipfile.ZipFile(tmp_path / "a.zip").namelist()
    tracked = {
        str(p.relative_to(ROOT)) for p in (ROOT / "etl").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert set(names) == tracked
    assert "etl/conf/config.yaml" in names


def test_a_pipeline_goes_to_ray_with_its_own_options_alone():
    options = ["submit=pipeline", "target=ray", "address=http://h:8265", "pipeline=demo", "pipeline.work=/shared/w"]
    line = submitting.entrypoint(load(options), options)
    assert line == "python -m cluster pipeline=demo pipeline.work=/shared/w pipeline.on_ray=true"


@pytest.mark.parametrize("given", ["etl", "pipeline"])
def test_sparks_workers_get_the_interpreter_that_was_named_for_them(given, monkeypatch):
    seen = []
    monkeypatch.setenv("PYSPARK_PYTHON", "before")
    monkeypatch.setattr(submitting, "require_master", lambda master: seen.clear())
    monkeypatch.setattr(submitting, "run", lambda _, env: seen.append(env["PYSPARK_PYTHON"]) or 0)
    monkeypatch.setattr(submitting, "run_pipeline", lambda _: seen.append(os.environ["PYSPARK_PYTHON"]))
    options = [f"submit={given}", "target=standalone", "address=spark://h:7077", "python=/opt/env/bin/python"]
    assert submitting.submit(load(options), options) == 0
    assert seen == ["/opt/env/bin/python"]


def test_the_working_directory_that_ray_uploads_is_small():
    ignored = [line.rstrip("/") for line in (ROOT / ".rayignore").read_text().split()]
    size = 0
    for path in ROOT.iterdir():
        if path.name not in ignored:
            size += sum(
                p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file() and "__pycache__" not in p.parts
            )
    assert size < 3 << 20


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
    """Templates of head, workers and the pod that submits."""
    spec = job["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [*(group["template"] for group in groups), job["spec"]["submitterPodTemplate"]]


def pods(found: dict) -> list[dict]:
    templates = [v["spec"]["template"] for v in found.values() if v["kind"] == "Job"]
    for value in found.values():
        if value["kind"] == "RayJob":
            templates += ray_pods(value)
    return templates


@pytest.mark.parametrize("what", ["train", "evaluate", "pipeline"])
def test_pods_are_closed_and_nobody_is_root_and_no_secret_is_written_down(what):
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


def test_a_ray_job_is_elastic_and_ends_with_its_job():
    spec = rendered("train", "kubernetes.workers=[2,9]")["train.yaml"]["spec"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 2, 9)
    assert spec["shutdownAfterJobFinishes"]
    settled = "'ray.workers=[2,9]' ray.use_gpu=true ray.cores=8"
    assert spec["entrypoint"] == f"python -m trainer data=/shared/d output=/shared/r model=hybrid {settled}"
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "ray-token"}


def test_ray_reads_from_the_job_what_was_meant():
    """By the parser of Ray's own autoscaler, which reads such specifications on Kubernetes."""
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


def test_keys_of_a_store_come_from_its_secret_alone():
    pod = rendered("evaluate", *STORE)["evaluate.yaml"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert {"name": "shared", "emptyDir": {}} in pod["volumes"]
    etl = load(["submit=etl", "target=kubernetes", "kubernetes.store_secret=store"])
    line = " ".join(spark_command(etl, Path("/k")))
    for part in ("driver", "executor"):
        assert f"spark.kubernetes.{part}.secretKeyRef.AWS_SECRET_ACCESS_KEY=store:AWS_SECRET_ACCESS_KEY" in line


def test_spark_on_kubernetes_sees_the_shared_storage_and_authenticates():
    options = [
        "submit=etl",
        "target=kubernetes",
        "address=https://h:6443",
        "options=input=/shared/a.csv output=/shared/d",
    ]
    line = " ".join(spark_command(load(options), Path("/k")))
    assert "--master k8s://https://h:6443 --deploy-mode cluster" in line
    assert "spark.authenticate=true" in line
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
"""Variables that Spark gives its pods (`org.apache.spark.deploy.k8s.Constants`)."""


@pytest.mark.spark
@pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer")
def test_the_image_takes_the_roles_that_spark_gives_its_pods(tmp_path):
    """As Spark on Kubernetes starts them: a driver with its properties, executors by variables alone."""
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


def test_without_kubectl_the_manifests_are_written_and_named(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    out = f"kubernetes.output={tmp_path / 'k'}"
    assert main(["submit=evaluate", "target=kubernetes", "options=bundle=b data=d output=o", out]) == 0
    assert f"kubectl apply --filename={tmp_path / 'k'}/network-policy.yaml" in capfd.readouterr().out
    assert {p.name for p in (tmp_path / "k").iterdir()} == {"network-policy.yaml", "evaluate.yaml"}


SUBMISSION = {
    "action": "CreateSubmissionRequest",
    "clientSparkVersion": pyspark.__version__,
    "appResource": "file:///nowhere.py",
    "mainClass": "org.apache.spark.deploy.SparkSubmit",
    "appArgs": [],
    "environmentVariables": {},
    "sparkProperties": {"spark.app.name": "stranger", "spark.submit.deployMode": "cluster"},
}
"""What Spark's REST server starts on a worker, whoever sends it."""


def assert_spark_takes_nothing_without_the_secret(processes: list[dict]) -> None:
    """Master and worker listen on the loopback alone, each for RPC and its page; neither starts what is posted."""
    for name in ("spark-master", "spark-worker-1"):
        (pid,) = (entry["pid"] for entry in processes if entry["name"] == name)
        actual = [c.laddr for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert {address.ip.removeprefix("::ffff:") for address in actual} == {"127.0.0.1"}
        assert len(actual) == 2
        for address in actual:
            url = f"http://127.0.0.1:{address.port}/v1/submissions/create"
            request = urllib.request.Request(url, json.dumps(SUBMISSION).encode(), {"Content-Type": "application/json"})
            with pytest.raises((OSError, http.client.HTTPException)):
                urllib.request.urlopen(request, timeout=20)


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer")
def test_a_cluster_on_this_machine_takes_all_programs_and_ends_with_what_it_started(tmp_path, capfd):
    state = [f"local.state={tmp_path / 'c'}", "local.nodes=1"]
    assert main(["action=up", *state]) == 0
    try:
        message = json.loads((tmp_path / "c" / "state.json").read_text())
        token = tmp_path / "c" / "token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert main(["action=up", *state]) == 2
        assert main(["action=status", *state]) == 0
        assert "ended" not in capfd.readouterr().out
        assert_spark_takes_nothing_without_the_secret(message["processes"])
        log = generated_log(tmp_path / "log.csv", users=40, items=30, seed=3)
        data, run = tmp_path / "data", tmp_path / "run"
        env = os.environ | {"RAY_AUTH_TOKEN_PATH": str(token), "SPARK_CONF_DIR": str(tmp_path / "c" / "spark")}

        def submitted(what: str, target: str, address: str, options: str, env: dict[str, str] = env) -> Popen:
            line = [sys.executable, "-m", "cluster", f"submit={what}", f"target={target}", f"address={address}"]
            line += [f"python={sys.executable}", f"options={options}"]
            return Popen(line, cwd=ROOT, env=env)

        etl = f"input={log} scenario=qb_video shards=2"
        unknown = env | {"SPARK_CONF_DIR": str(tmp_path / "nowhere")}  # who is refused after Spark's many tries
        stranger = submitted("etl", "standalone", message["spark"], f"{etl} output={tmp_path / 'strange'}", unknown)
        nothing = submitted("train", "ray", message["ray"], "data=/nowhere output=x model=gru4rec")
        assert submitted("etl", "standalone", message["spark"], f"{etl} output={data}").wait(300) == 0
        assert nothing.wait(300) == 2
        train = f"data={data} output={run} model=gru4rec {' '.join(SMALL[:-3])} train.epochs=1 ray.workers=1"
        assert submitted("train", "ray", message["ray"], train).wait(300) == 0
        evaluation = f"bundle={run / 'bundle'} data={data} output={tmp_path / 'result'}"
        assert submitted("evaluate", "ray", message["ray"], evaluation).wait(300) == 0
        assert stranger.wait(300) not in (0, None)
        assert not (tmp_path / "strange").exists()
        secret = (tmp_path / "c" / "spark" / "spark-defaults.conf").read_text().split("secret ")[1].split()[0]
        for text in (p.read_text(errors="replace") for p in (tmp_path / "c").glob("*.log")):
            assert token.read_text() not in text
            assert secret not in text
    finally:
        assert main(["action=down", *state]) == 0
    assert "ray-head ended" in capfd.readouterr().out
    assert not token.exists()
    assert not Path(message["temporary"]).exists()
