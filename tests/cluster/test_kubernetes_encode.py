"""cluster/kubernetes/encode, rendered: what KubeRay, Kubernetes and the encoding job itself make of it."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from rich.console import Console

from dit_scale.cli import main
from dit_scale.config import EncodeConfig
from dit_scale_pipeline import job as encoding
from tests.needs import needs

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster/kubernetes/encode"
IN_IMAGE = "/opt/dit-scale"
UNITS = {"Gi": 2**30, "Mi": 2**20}


def render(folder: Path) -> dict[str, Any]:
    """The only object that `kubectl kustomize` makes of a folder: the RayJob."""
    needs(shutil.which("kubectl") is not None, "kubectl")
    ran = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    (job,) = yaml.safe_load_all(ran.stdout)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    return dict(job)


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return render(FOLDER)


@pytest.fixture
def overlay(tmp_path: Path) -> dict[str, Any]:
    """The example in the header of kustomization.yaml, in a folder of its own."""
    header = (FOLDER / "kustomization.yaml").read_text()
    example = "\n".join(re.findall(r"^#   ( *(?!kubectl).*)$", header, re.MULTILINE))
    example = example.replace("../cluster/kubernetes/encode", os.path.relpath(FOLDER, tmp_path))
    (tmp_path / "kustomization.yaml").write_text(example)
    return render(tmp_path)


def templates(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates by the name of their container."""
    cluster = job["spec"]["rayClusterSpec"]
    found = [
        job["spec"]["submitterPodTemplate"],
        cluster["headGroupSpec"]["template"],
        *(group["template"] for group in cluster["workerGroupSpecs"]),
    ]
    return {template["spec"]["containers"][0]["name"]: template for template in found}


def specs(job: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each pod's specification and its only container."""
    for template in templates(job).values():
        (container,) = template["spec"]["containers"]
        yield template["spec"], container


def parsed(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> EncodeConfig:
    """What the encoding job would do, by its own command line, once the operator's shell has read it."""
    entrypoint = job["spec"]["entrypoint"]
    shell = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {entrypoint} ;'], capture_output=True, text=True, check=True
    )
    program, script, *arguments = shell.stdout.splitlines()
    assert [program, script, *arguments] == entrypoint.split()
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
    assert config.source.startswith("s3://")
    assert config.output.startswith("s3://")
    assert config.ray_address == "auto"


def test_a_lost_cluster_is_replaced_and_a_finished_one_goes(job: dict[str, Any]) -> None:
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
    """As the Pod Security Standard `restricted` asks, and with a root file system that is only read."""
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


def test_what_is_written_lies_on_volumes(job: dict[str, Any]) -> None:
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
    assert head["rayStartParams"]["num-cpus"] == "0", "the head has no GPU: no work is placed there"


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
    assert parsed(overlay, monkeypatch).image_size == 512
    (before,), (after,) = (made["spec"]["rayClusterSpec"]["workerGroupSpecs"] for made in (job, overlay))
    assert before["replicas"] < after["replicas"] <= after["maxReplicas"]
    images = [{container["image"] for _, container in specs(made)} for made in (job, overlay)]
    assert images == [{"dit-scale:0.1.0"}, {"registry.example.com/dit-scale:0.2.0"}]
