"""Manifests: derived options, Pod Security, shell quoting of options, and the calls of kubectl."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from cluster.__main__ import main
from cluster.config import load
from cluster.kubernetes import manifests, spark_command
from cluster.pods import QUEUE_LABEL
from etl.runtime.errors import InputError
from etl.runtime.option_files import expand_files
from trainer.config import load as trainer_options

VERSION = "1.34"
TRAIN = ["submit=train", "target=kubernetes"]
PLACES = [
    "kubernetes.tolerations=nvidia.com/gpu:NoSchedule team=ml:NoExecute",
    "kubernetes.node_selector=zone=a disk=ssd",
    "kubernetes.pull_secret=registry",
    "kubernetes.queue=nightly",
]


def entrypoint_of(*options: str) -> str:
    arguments = [*TRAIN, "options=data=/shared/d output=/shared/r model=hybrid", *options]
    return manifests(load(arguments), arguments)["train.yaml"]["spec"]["entrypoint"]


@pytest.mark.parametrize(
    ("command_line", "settled"),
    [
        ([], ([2, 8], True, 8)),
        (["kubernetes.gpus=0", "kubernetes.workers=[3,3]", "kubernetes.cpus=4"], (3, False, 4)),
        (["kubernetes.queue=nightly"], (2, True, 8)),
        (["kubernetes.workers=[4]"], (4, True, 8)),
        (["options=data=d output=r model=hybrid ray.workers=1 ray.use_gpu=false"], (1, False, 8)),
    ],
)
def test_workers_gpus_and_cores_of_training_are_derived_from_the_options(command_line, settled):
    """Parsed by the trainer's own options; explicit options of the user win."""
    python, module, program, *options = shlex.split(entrypoint_of(*command_line))
    assert (python, module, program) == ("python", "-m", "trainer")
    ray = trainer_options([o for o in options if not o.startswith("ray.workers")]).ray
    (workers,) = (yaml.safe_load(o.partition("=")[2]) for o in options if o.startswith("ray.workers"))
    assert (workers, ray.use_gpu, ray.cores) == settled


def test_options_in_a_file_win_over_those_of_the_manifest(tmp_path):
    (tmp_path / "own.yaml").write_text("ray: {workers: 3, use_gpu: false}")
    _, _, _, *options = shlex.split(entrypoint_of(f"options=data=d output=r model=hybrid @{tmp_path / 'own.yaml'}"))
    last = dict(option.split("=", 1) for option in expand_files(options))
    assert (last["ray.workers"], last["ray.use_gpu"], last["ray.cores"]) == ("3", "false", "8")


def test_pipeline_trains_with_the_workers_of_the_manifest():
    options = [
        "submit=pipeline",
        "target=kubernetes",
        "kubernetes.gpus=0",
        "pipeline.trainer=train.epochs=3 ray.cores=2",
    ]
    line = manifests(load(options), options)["pipeline.yaml"]["spec"]["entrypoint"]
    (trainer,) = (o for o in shlex.split(line) if o.startswith("pipeline.trainer="))
    assert trainer == "pipeline.trainer=ray.workers=[2,8] ray.use_gpu=false train.epochs=3 ray.cores=2"
    assert load(shlex.split(line)[3:]).pipeline.trainer == trainer.partition("=")[2]


ODD = ["a=1&2", "b=$HOME", "c=it's", "d=$(rm x)", "e=two words", "f=$$", 'g="q"', "h=a;b|c>d", "i=\\n`x`"]


def expand(argument: str) -> str:
    """What Kubernetes makes of an argument in a container without variables: `$$` becomes `$`."""
    return argument.replace("$$", "$")


def by_shell(line: str) -> list[str]:
    """Split a line into words by a shell."""
    script = f"for word in {line}; do printf '%s\\0' \"$word\"; done"
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def test_shell_special_characters_in_options_reach_the_program_unchanged():
    """KubeRay passes the line through a container's arguments and a shell to `ray job submit`, which quotes it again
    for the shell of the head; a Job and Spark's pods get arguments, and no shell.
    """
    options = [*TRAIN, f"options={shlex.join(ODD)}"]
    line = manifests(load(options), options)["train.yaml"]["spec"]["entrypoint"]
    submitted = shlex.join(by_shell(expand(line)))
    assert by_shell(submitted)[-len(ODD) :] == ODD
    options = ["submit=evaluate", "target=kubernetes", f"options={shlex.join(ODD)}"]
    (container,) = manifests(load(options), options)["evaluate.yaml"]["spec"]["template"]["spec"]["containers"]
    assert [expand(a) for a in container["command"][3:]] == ODD
    options = ["submit=etl", "target=kubernetes", f"options={shlex.join(ODD)}"]
    assert [expand(a) for a in spark_command(load(options), Path("/k"))[-len(ODD) :]] == ODD


def restricted(spec: dict, containers: list[dict]) -> list[str]:
    """Violations of Pod Security's level "restricted" (Kubernetes 1.34) in a Linux pod."""
    own, wrong = spec["securityContext"], []
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        wrong += [name] if spec.get(name) else []
    allowed = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    wrong += [str(volume) for volume in spec.get("volumes", []) if not set(volume) - {"name"} <= allowed]
    for container in containers:
        security = container["securityContext"]
        settled = own | security
        if security["allowPrivilegeEscalation"] is not False or security.get("privileged"):
            wrong.append("privileges")
        if "ALL" not in security["capabilities"]["drop"] or security["capabilities"].get("add", []):
            wrong.append("capabilities")
        if settled["runAsNonRoot"] is not True or settled.get("runAsUser") == 0:
            wrong.append("root")
        if settled["seccompProfile"]["type"] not in ("RuntimeDefault", "Localhost"):
            wrong.append("seccomp")
        if any("hostPort" in port for port in container.get("ports", [])):
            wrong.append("host port")
    return wrong


def pods_of(value: dict) -> list[dict]:
    if value["kind"] == "Pod":
        return [value]
    if value["kind"] == "Job":
        return [value["spec"]["template"]]
    if value["kind"] == "RayJob":
        spec = value["spec"]["rayClusterSpec"]
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        return [*(group["template"] for group in groups), value["spec"]["submitterPodTemplate"]]
    return []


@pytest.mark.parametrize("what", ["etl", "train", "evaluate", "pipeline"])
@pytest.mark.parametrize("places", [[], PLACES])
def test_pods_pass_pod_security_restricted_and_have_the_requested_placement(what, places):
    options = [f"submit={what}", "target=kubernetes", "options=data=d", *places]
    actual = manifests(load(options), options)
    seen = 0
    for value in actual.values():
        for pod in pods_of(value):
            seen += 1
            complete = {"apiVersion": "v1", "kind": "Pod", **pod, "metadata": {**pod["metadata"], "name": "p"}}
            kubernetes_validate.validate(complete, VERSION, strict=True)
            containers = [*pod["spec"]["containers"]]
            if value["kind"] == "RayJob":  # KubeRay adds the autoscaler's to the head's pod
                containers.append({"name": "autoscaler", **value["spec"]["rayClusterSpec"]["autoscalerOptions"]})
            assert restricted(pod["spec"], containers) == []
            if places:
                assert pod["spec"]["nodeSelector"] == {"zone": "a", "disk": "ssd"}
                assert [t["key"] for t in pod["spec"]["tolerations"]] == ["nvidia.com/gpu", "team"]
                assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        if value["kind"] in ("Job", "RayJob"):
            assert value["metadata"]["labels"].get(QUEUE_LABEL) == ("nightly" if places else None)
        if value["kind"] == "RayJob":  # a queue admits a job as a whole
            assert value["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is not bool(places)
    assert seen == {"etl": 1, "evaluate": 1}.get(what, 3)


def test_spark_pods_use_the_written_pod_template():
    options = ["submit=etl", "target=kubernetes", *PLACES]
    line = " ".join(spark_command(load(options), Path("/k")))
    for part in ("driver", "executor"):
        assert f"spark.kubernetes.{part}.podTemplateFile=/k/spark-pod.yaml" in line
        assert f"spark.kubernetes.{part}.podTemplateContainerName=spark" in line
    assert "spark.kubernetes.container.image.pullSecrets=registry" in line
    assert "spark.ui.enabled=false" in line


@pytest.mark.parametrize(
    "wrong",
    ["tolerations=gpu:Never", "tolerations=a=b:c:d", "node_selector=zone", "gpus=-1", "cpus=0", "workers=[1,2,3]"],
)
def test_invalid_placement_and_sizes_are_refused(wrong):
    with pytest.raises(InputError, match=f"kubernetes.{wrong.partition('=')[0]}"):
        load([*TRAIN, f"kubernetes.{wrong}"])


KUBECTL = """#!/bin/sh
echo "$@" >> {calls}
case "$1" in get) cat {state} 2> /dev/null ;; esac
exit 0
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A fake kubectl that answers `get` with the content of a file and records its arguments."""
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL.format(calls=tmp_path / "calls", state=tmp_path / "state"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return tmp_path


def submit(folder: Path, *more: str) -> int:
    out = folder / "k"
    out.mkdir(exist_ok=True)
    (out / "old.yaml").write_text("of another submit")
    return main(["submit=evaluate", "target=kubernetes", "options=bundle=b", f"kubernetes.output={out}", *more])


def test_only_manifests_of_this_submission_are_applied(kubectl):
    assert submit(kubectl) == 0
    get, apply = (kubectl / "calls").read_text().splitlines()
    assert get.startswith("get job/nextclick-evaluate --namespace=nextclick")
    folder = kubectl / "k"
    assert apply == f"apply --filename={folder}/network-policy.yaml --filename={folder}/evaluate.yaml"


def test_manifests_are_rendered_without_applying(kubectl, capfd):
    assert submit(kubectl, "kubernetes.apply=false") == 0
    assert not (kubectl / "calls").exists()
    assert "kubernetes.apply=false, so nothing was applied" in capfd.readouterr().out
    assert yaml.safe_load((kubectl / "k" / "evaluate.yaml").read_text())["kind"] == "Job"


@pytest.mark.parametrize(
    "status",
    [
        {"conditions": [{"type": "Complete", "status": "True"}]},
        {"conditions": [{"type": "Failed", "status": "True"}]},
        {"jobDeploymentStatus": "Complete"},
    ],
)
def test_finished_job_of_the_same_name_is_deleted_first(kubectl, status):
    (kubectl / "state").write_text(json.dumps({"status": status}))
    assert submit(kubectl) == 0
    calls = [line.split()[0] for line in (kubectl / "calls").read_text().splitlines()]
    assert calls == ["get", "delete", "apply"]


@pytest.mark.parametrize(
    "status",
    [{}, {"active": 1}, {"conditions": [{"type": "Complete", "status": "False"}]}, {"jobDeploymentStatus": "Running"}],
)
def test_running_job_of_the_same_name_is_an_error_and_is_kept(kubectl, status, capfd):
    (kubectl / "state").write_text(json.dumps({"status": status}))
    assert submit(kubectl) == 2
    assert "error: expected no running job/nextclick-evaluate, got one" in capfd.readouterr().err
    assert (kubectl / "calls").read_text().count("\n") == 1
