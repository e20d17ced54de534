"""cluster/kubernetes/encode, rendered, as KubeRay, Kubernetes and the encoding job read it."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from rich.console import Console

from dit_scale.cli import main
from dit_scale.config import EncodeConfig
from dit_scale_pipeline import job as encoding
from tests.support.cluster.kustomize import KUBERNETES, ROOT, render

pytestmark = pytest.mark.cluster

FOLDER = KUBERNETES / "encode"
IN_IMAGE = "/opt/dit-scale"
UNITS = {"Gi": 2**30, "Mi": 2**20}


def rayjob(folder: Path) -> dict[str, Any]:
    """Return the RayJob of a folder. `settings` go to its submitter, not into the RayJob."""
    settings, job = sorted(render(folder), key=lambda made: str(made["kind"]))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert settings["kind"] == "ConfigMap"
    (submitter,) = job["spec"]["submitterPodTemplate"]["spec"]["containers"]
    assert submitter["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]
    return job | {"settings": settings["data"]}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return rayjob(FOLDER)


@pytest.fixture
def overlay(tmp_path: Path) -> dict[str, Any]:
    """The example in the header of kustomization.yaml, in a folder of its own."""
    header = (FOLDER / "kustomization.yaml").read_text()
    example = "\n".join(re.findall(r"^#   ( *(?!kubectl).*)$", header, re.MULTILINE))
    example = example.replace("../cluster/kubernetes/encode", os.path.relpath(FOLDER, tmp_path))
    (tmp_path / "kustomization.yaml").write_text(example)
    return rayjob(tmp_path)


def templates(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pod templates by the name of their container."""
    cluster = job["spec"]["rayClusterSpec"]
    found = [
        job["spec"]["submitterPodTemplate"],
        cluster["headGroupSpec"]["template"],
        *(group["template"] for group in cluster["workerGroupSpecs"]),
    ]
    return {template["spec"]["containers"][0]["name"]: template for template in found}


def specs(job: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the specification of each pod and its only container."""
    for template in templates(job).values():
        (container,) = template["spec"]["containers"]
        yield template["spec"], container


def parsed(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> EncodeConfig:
    """Return what the encoding job's own command line makes of the arguments, after the operator's shell."""
    entrypoint = job["spec"]["entrypoint"]
    command = ["bash", "-uc", f'printf "%s\\n" {entrypoint} ;']
    shell = subprocess.run(command, env=job["settings"], capture_output=True, text=True, check=True)
    program, script, *arguments = shell.stdout.splitlines()
    expanded = entrypoint.replace("$BUCKET", job["settings"]["BUCKET"])
    assert [program, script, *arguments] == expanded.split()
    assert (program, script) == ("python", f"{IN_IMAGE}/data_pipeline/encode_latents.py")
    configs: list[EncodeConfig] = []

    def encode(config: EncodeConfig, console: Console) -> None:
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "encode", encode)
    assert main(["encode", *(word.replace(IN_IMAGE, str(ROOT)) for word in arguments)]) == 130
    return configs[0]


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


@pytest.mark.parametrize("minor", range(28, 38))
def test_pods_are_valid(job: dict[str, Any], minor: int) -> None:
    assert set(templates(job)) == {"ray-job-submitter", "ray-head", "ray-worker"}
    for name, template in templates(job).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template}
        kubernetes_validate.validate(pod, f"1.{minor}", strict=True)


def test_the_job_understands_its_entrypoint(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(job, monkeypatch)
    assert config.image_size == 256
    # nothing else is the same on all pods
    assert (config.source, config.output) == ("s3://bucket/imagenet/train", "s3://bucket/imagenet256")
    assert config.ray_address == "auto"


def test_a_lost_cluster_is_replaced_and_a_finished_one_deleted(job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0


def test_ray_is_the_pinned_one_and_asks_for_a_token(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert cluster["authOptions"] == {"mode": "token"}


def test_pods_are_restricted(job: dict[str, Any]) -> None:
    """Pods meet the Pod Security Standard `restricted` and run with a read-only root file system."""
    for spec, container in specs(job):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for kind in ("hostNetwork", "hostPID", "hostIPC", "initContainers"):
            assert kind not in spec


def test_all_writes_go_to_volumes(job: dict[str, Any]) -> None:
    for spec, container in specs(job):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert set(mounts.values()) == set(volumes)
        assert all("sizeLimit" in volume["emptyDir"] for volume in volumes.values())
        written = {entry["value"] for entry in container["env"] if entry["name"] in ("HOME", "HF_HOME")}
        assert {"/tmp"} <= written <= set(mounts)


def test_the_object_store_fits_into_shared_memory_and_that_into_the_container(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        (shared,) = [v["emptyDir"] for v in spec["volumes"] if v["emptyDir"].get("medium") == "Memory"]
        assert {"name": "shared-mem", "mountPath": "/dev/shm"} in container["volumeMounts"]
        memory = size(container["resources"]["limits"]["memory"])
        assert int(group["rayStartParams"]["object-store-memory"]) < size(shared["sizeLimit"]) < memory


def test_resources(job: dict[str, Any]) -> None:
    for _, container in specs(job):
        requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
        assert set(requests) == set(limits) >= {"cpu", "memory"}
        gpus = "1" if container["name"] == "ray-worker" else None
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu") == gpus
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0", "the head has no GPU, so Ray must place no work there"


def test_secrets_are_references(job: dict[str, Any]) -> None:
    for _, container in specs(job):
        for entry in container["env"]:
            assert not re.search("KEY|SECRET|TOKEN|PASSWORD|AWS", entry["name"]), entry["name"]
    for name in ("ray-head", "ray-worker"):
        (container,) = templates(job)[name]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "dit-scale-s3", "optional": True}}]


def test_the_documented_changes(
    job: dict[str, Any], overlay: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert overlay["metadata"]["name"] == "alice-encode-latents"
    assert overlay["metadata"]["namespace"] == "research"
    config = parsed(overlay, monkeypatch)
    assert (config.image_size, config.output) == (512, "s3://alice/imagenet512")
    (before,), (after,) = (made["spec"]["rayClusterSpec"]["workerGroupSpecs"] for made in (job, overlay))
    assert before["replicas"] < after["replicas"] <= after["maxReplicas"]
    images = [{container["image"] for _, container in specs(made)} for made in (job, overlay)]
    assert images == [{"dit-scale:0.1.0"}, {"registry.example.com/dit-scale:0.2.0"}]


def test_the_bucket_is_one_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = "{name: dit-scale-encode, behavior: merge, literals: [BUCKET=/data/mine]}"
    folder = os.path.relpath(FOLDER, tmp_path)
    text = f"resources: [{folder}]\nnamePrefix: bob-\nconfigMapGenerator: [{setting}]\n"
    (tmp_path / "kustomization.yaml").write_text(text)
    config = parsed(rayjob(tmp_path), monkeypatch)
    assert (config.source, config.output) == ("/data/mine/imagenet/train", "/data/mine/imagenet256")


def test_pod_identity(tmp_path: Path) -> None:
    folder = os.path.relpath(KUBERNETES, tmp_path)
    text = f"resources: [{folder}/encode]\ncomponents: [{folder}/components/identity]\n"
    (tmp_path / "kustomization.yaml").write_text(text)
    for name, template in templates(rayjob(tmp_path)).items():
        assert template["spec"]["imagePullSecrets"] == [{"name": "dit-scale-registry"}]
        assert template["spec"]["serviceAccountName"] == template["spec"]["priorityClassName"] == "dit-scale"
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template}
        kubernetes_validate.validate(pod, "1.37", strict=True)
