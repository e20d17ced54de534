"""cluster/kubernetes/sample, rendered, as Kubernetes, deepspeed and `dit-scale sample` read it."""

import os
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from deepspeed.launcher.runner import parse_args

from dit_scale.cli import _parse
from dit_scale.cli.sampling_arguments import sampling_worker
from tests.support.cluster.kustomize import KUBERNETES, render
from tests.support.cluster.pods import expand, variables, verdict

pytestmark = pytest.mark.cluster

FOLDER = KUBERNETES / "sample"
UNITS = {"Gi": 2**30}
Object = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> list[Object]:
    return render(FOLDER)


@pytest.fixture
def alice(tmp_path: Path) -> list[Object]:
    """The example in the header of kustomization.yaml, in a folder of its own."""
    header = (FOLDER / "kustomization.yaml").read_text().partition("apiVersion")[0]
    example = "\n".join(re.findall(r"^#   ( *(?!kubectl).*)$", header, re.MULTILINE))
    example = example.replace("../cluster/kubernetes", os.path.relpath(KUBERNETES, tmp_path))
    (tmp_path / "kustomization.yaml").write_text(example)
    return render(tmp_path)


def one(objects: list[Object], kind: str) -> Object:
    (found,) = (made for made in objects if made["kind"] == kind)
    return found


def pod_spec(objects: list[Object]) -> Object:
    return dict(one(objects, "Job")["spec"]["template"]["spec"])


def container(objects: list[Object]) -> Object:
    (found,) = pod_spec(objects)["containers"]
    return dict(found)


def parsed(objects: list[Object], index: int = 0) -> tuple[Any, Any]:
    """Return what deepspeed and `dit-scale sample` make of a pod's arguments."""
    known = variables(container(objects), {}, objects) | {"JOB_COMPLETION_INDEX": str(index)}
    assert container(objects)["command"] == ["tini", "-g", "--", "deepspeed"]
    launcher = parse_args([expand(text, known) for text in container(objects)["args"]])
    assert launcher.user_script == "dit_scale.cli"
    assert launcher.module
    assert launcher.no_local_rank
    return launcher, _parse(launcher.user_args)


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


@pytest.mark.parametrize("minor", range(29, 38))
def test_objects_are_valid(rendered: list[Object], minor: int) -> None:
    assert {made["kind"] for made in rendered} == {"ConfigMap", "Job"}
    for made in rendered:
        kubernetes_validate.validate(made, f"1.{minor}", strict=True)


def test_pods_share_the_images(rendered: list[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = one(rendered, "Job")["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 4
    monkeypatch.setenv("WORLD_SIZE", str(parsed(rendered)[0].num_gpus))
    shares = []
    for index in range(spec["completions"]):
        for rank in range(8):
            monkeypatch.setenv("RANK", str(rank))
            shares.append(sampling_worker(parsed(rendered, index)[1]))
    assert [share.index for share in shares] == list(range(32))
    assert {share.count for share in shares} == {32}


def test_the_command_line_understands_the_arguments(rendered: list[Object]) -> None:
    launcher, args = parsed(rendered)
    assert (args.source, args.out) == ("/runs/dit_xl2_256", "/runs/dit_xl2_256/samples")
    assert (args.images, args.guidance) == (50_000, 1.5)
    resources = container(rendered)["resources"]
    gpus = {resources[kind]["nvidia.com/gpu"] for kind in ("requests", "limits")}
    assert gpus == {str(launcher.num_gpus)}


def test_the_documented_changes(alice: list[Object]) -> None:
    job = one(alice, "Job")
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == ("alice-dit-scale-sample", "research")
    rules = pod_spec(alice)["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rules[0]["labelSelector"]["matchLabels"] == {
        "batch.kubernetes.io/job-name": "alice-dit-scale-sample"
    }
    assert container(alice)["image"] == "registry.example.com/dit-scale:0.2.0"
    _, args = parsed(alice, 1)
    assert (args.source, args.images, args.guidance, args.classes) == ("/runs/alice", 10_000, 4.0, [207, 360])
    assert (args.nodes, args.node) == (job["spec"]["completions"], 1)


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (0, False, "Succeeded"),
        (137, True, "Ignore"),
        (2, False, "FailJob"),
        (130, False, "Count"),
        (1, False, "Count"),
    ],
)
def test_how_the_job_judges_pod_failures(
    rendered: list[Object], code: int, disrupted: bool, action: str
) -> None:
    spec = one(rendered, "Job")["spec"]
    assert verdict(spec["podFailurePolicy"], code, disrupted) == action
    assert pod_spec(rendered)["restartPolicy"] == "Never", "podFailurePolicy requires it"
    assert spec["backoffLimitPerIndex"] > 10
    assert "backoffLimit" not in spec


def test_all_writes_go_to_volumes(rendered: list[Object]) -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in container(rendered)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_spec(rendered)["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert parsed(rendered)[1].out.startswith("/runs/")
    assert volumes[mounts["/runs"]]["persistentVolumeClaim"] == {"claimName": "dit-scale-runs"}
    memory = size(container(rendered)["resources"]["limits"]["memory"])
    assert size(volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"]) < memory
    for entry in container(rendered)["env"]:
        assert any(entry["value"].startswith(path) for path in mounts), entry


def test_pods_are_restricted(rendered: list[Object]) -> None:
    """Pods meet the Pod Security Standard `restricted` and run with a read-only root file system."""
    pod = pod_spec(rendered)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container(rendered)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_pod_identity(tmp_path: Path) -> None:
    folder = os.path.relpath(KUBERNETES, tmp_path)
    text = f"resources: [{folder}/sample]\ncomponents: [{folder}/components/identity]\n"
    (tmp_path / "kustomization.yaml").write_text(text)
    assert pod_spec(render(tmp_path))["serviceAccountName"] == "dit-scale"
