"""The training jobs of cluster/kubernetes, rendered, as Kubernetes and `dit-scale launch` read them."""

import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from dit_scale.cli import _parse
from dit_scale.cli.launch import node_range
from dit_scale.config import TrainConfig, load
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.policy import Policy
from tests.support.cluster.kustomize import KUBERNETES, OVERLAYS, ROOT, render
from tests.support.cluster.pods import expand, variables, verdict

pytestmark = pytest.mark.cluster

IN_IMAGE = "/opt/dit-scale"
NAMES = sorted(path.name for path in OVERLAYS.iterdir())
JOBS = ["xl2_256", "xl2_512"]
MINORS = range(28, 38)
UNITS = {"Gi": 2**30, "Mi": 2**20}
BAD_OPTION = 2
"""Exit code of argparse."""
Object = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Object]]:
    return {name: render(OVERLAYS / name) for name in NAMES}


def written(folder: Path, text: str) -> list[Object]:
    """Render a user's own kustomization."""
    up = os.path.relpath(KUBERNETES, folder)
    (folder / "kustomization.yaml").write_text(text.replace("../cluster/kubernetes", up))
    return render(folder)


def example(path: Path) -> str:
    """Return the example in the header of a kustomization, without the commands."""
    header = path.read_text().partition("apiVersion")[0]
    return "\n".join(re.findall(r"^#   ( *(?!kubectl).*)$", header, re.MULTILINE))


@pytest.fixture
def alice(tmp_path: Path) -> list[Object]:
    (tmp_path / "my.yaml").write_text("steps: 5\n")
    return written(tmp_path, example(OVERLAYS / "xl2_256/kustomization.yaml"))


def one(objects: list[Object], kind: str) -> Object:
    (found,) = (made for made in objects if made["kind"] == kind)
    return found


def job_spec(objects: list[Object]) -> Object:
    """Return the pod of the Job, or of the only Job in a JobSet."""
    kinds = [made["kind"] for made in objects]
    if "Job" in kinds:
        return dict(one(objects, "Job")["spec"])
    (replicated,) = one(objects, "JobSet")["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return dict(replicated["template"]["spec"])


def pod_spec(objects: list[Object]) -> Object:
    return dict(job_spec(objects)["template"]["spec"])


def container(objects: list[Object]) -> Object:
    (found,) = pod_spec(objects)["containers"]
    return dict(found)


def launch(objects: list[Object], index: int = 0) -> tuple[Any, TrainConfig | None]:
    """Return what the command line makes of a pod's arguments, or the configuration if the image has it."""
    labels = {"batch.kubernetes.io/job-name": "job"}
    known = variables(container(objects), labels, objects) | {"JOB_COMPLETION_INDEX": str(index)}
    assert container(objects)["command"] == ["tini", "--", "dit-scale"]
    args = _parse([expand(text, known) for text in container(objects)["args"]])
    assert args.name == "dit-scale launch"
    if not args.config.startswith(IN_IMAGE):
        return args, None
    return args, load(TrainConfig, args.config.replace(IN_IMAGE, str(ROOT)), args.overrides)


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]


@pytest.mark.parametrize("minor", MINORS)
@pytest.mark.parametrize("name", NAMES)
def test_objects_are_valid(rendered: dict[str, list[Object]], name: str, minor: int) -> None:
    kinds = {"ConfigMap", "JobSet"} if name.endswith("jobset") else {"ConfigMap", "Job", "Service"}
    assert {made["kind"] for made in rendered[name]} == kinds
    for made in rendered[name]:
        if made["kind"] == "JobSet":
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": made["metadata"]}
            made = job | {"spec": job_spec(rendered[name])}
        kubernetes_validate.validate(made, f"1.{minor}", strict=True)


def test_the_jobset_is_valid(rendered: dict[str, list[Object]]) -> None:
    made = deepcopy(one(rendered["xl2_512_jobset"], "JobSet"))
    # the models accept no quantities as text; test_objects_are_valid checks the pod
    made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"] = {
        "containers": [{"name": "a"}]
    }
    # unknown fields would be dropped
    assert JobsetV1alpha2JobSet.model_validate(made).to_dict() == made


def test_the_jobset_is_the_job(rendered: dict[str, list[Object]]) -> None:
    job, wrapped = (deepcopy(job_spec(rendered[name])) for name in ("xl2_512", "xl2_512_jobset"))
    jobset = one(rendered["xl2_512_jobset"], "JobSet")
    assert job["template"]["spec"].pop("subdomain") == "dit-scale-xl2-512"
    assert job.pop("ttlSecondsAfterFinished") == jobset["spec"]["ttlSecondsAfterFinished"]
    assert apart(job).pop("batch.kubernetes.io/job-name") == "dit-scale-xl2-512"
    assert apart(wrapped).pop("jobset.sigs.k8s.io/jobset-name") == "dit-scale-xl2-512"
    assert job == wrapped
    assert jobset["metadata"]["name"] == "dit-scale-xl2-512"
    assert jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_understands_the_arguments(rendered: dict[str, list[Object]], name: str) -> None:
    objects = rendered[name]
    args, config = launch(objects, 3)
    assert config is not None
    assert (args.node, args.address) == ("job-3", "10.0.0.1")
    size_px = 512 if "512" in name else 256
    assert config.model.image_size == size_px
    assert f"_{size_px}" in config.run
    least, most = node_range(args.nodes)
    spec = job_spec(objects)
    assert least < most == spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    for nodes in (least, most):
        assert config.global_batch % (8 * nodes) == 0, "every GPU must have the same work"


@pytest.mark.parametrize("name", NAMES)
def test_all_writes_go_to_volumes(rendered: dict[str, list[Object]], name: str) -> None:
    _, config = launch(rendered[name])
    assert config is not None
    mounts = {mount["mountPath"]: mount["name"] for mount in container(rendered[name])["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_spec(rendered[name])["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert config.run.startswith("/runs/")
    assert volumes[mounts["/runs"]]["persistentVolumeClaim"] == {"claimName": "dit-scale-runs"}
    assert config.data.cache_dir.startswith("/cache/")
    assert config.data.cache_bytes < size(volumes[mounts["/cache"]]["emptyDir"]["sizeLimit"])
    memory = size(container(rendered[name])["resources"]["limits"]["memory"])
    shared = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shared["medium"] == "Memory"
    assert size(shared["sizeLimit"]) < memory
    for entry in container(rendered[name])["env"]:
        if entry.get("value", "").startswith("/"):
            assert any(entry["value"].startswith(path) for path in mounts), entry


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (Exit.DONE, False, "Succeeded"),
        (Exit.REQUEUE, False, "Ignore"),
        (Exit.REQUEUE, True, "Ignore"),
        (137, True, "Ignore"),
        (Exit.DO_NOT_RESTART, False, "FailJob"),
        (BAD_OPTION, False, "FailJob"),
        (Exit.FAILED, False, "Count"),
        (137, False, "Count"),
    ],
)
def test_how_the_job_judges_pod_failures(
    rendered: dict[str, list[Object]], code: int, disrupted: bool, action: str
) -> None:
    for name in NAMES:
        spec = job_spec(rendered[name])
        assert verdict(spec["podFailurePolicy"], code, disrupted) == action
        for rule in spec["podFailurePolicy"]["rules"]:
            assert rule.get("onExitCodes", {}).get("containerName", "train") == "train"


@pytest.mark.parametrize("name", NAMES)
def test_the_job_tolerates_a_week_of_failures(rendered: dict[str, list[Object]], name: str) -> None:
    spec, pod = job_spec(rendered[name]), pod_spec(rendered[name])
    assert spec["podReplacementPolicy"] == "Failed"
    assert pod["restartPolicy"] == "Never", "podFailurePolicy requires it"
    assert spec["backoffLimit"] > 7 * 24 * 60 * spec["completions"], "each pod may fail every minute"
    assert spec["backoffLimitPerIndex"] == spec["backoffLimit"], "no index waits for the failures of others"
    assert "activeDeadlineSeconds" not in spec
    assert pod["terminationGracePeriodSeconds"] > Policy().save_s


@pytest.mark.parametrize("name", NAMES)
def test_pods_are_restricted(rendered: dict[str, list[Object]], name: str) -> None:
    """Pods meet the Pod Security Standard `restricted` and run with a read-only root file system."""
    pod = pod_spec(rendered[name])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container(rendered[name])["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)


@pytest.mark.parametrize("name", NAMES)
def test_secrets_are_references(rendered: dict[str, list[Object]], name: str) -> None:
    env = container(rendered[name])["envFrom"]
    assert {"secretRef": {"name": "dit-scale-s3", "optional": True}} in env
    assert not any(made["kind"] == "Secret" for made in rendered[name])
    literal = {entry["name"] for entry in container(rendered[name])["env"] if "value" in entry}
    literal |= {key for made in rendered[name] if made["kind"] == "ConfigMap" for key in made.get("data", {})}
    assert not [key for key in literal if re.search("KEY|SECRET|TOKEN|PASSWORD|AWS", key)]


def apart(spec: Object) -> Object:
    """Return the labels of pods that must not share a node with a pod of this Job."""
    rules = spec["template"]["spec"]["affinity"]["podAntiAffinity"]
    (rule,) = rules["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    return dict(rule["labelSelector"])["matchLabels"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_job_is_deleted_after_days(rendered: dict[str, list[Object]], name: str) -> None:
    owner = next(made for made in rendered[name] if made["kind"] in ("Job", "JobSet"))
    assert owner["spec"]["ttlSecondsAfterFinished"] >= 24 * 3600


@pytest.mark.parametrize("name", NAMES)
def test_one_pod_takes_a_complete_node(rendered: dict[str, list[Object]], name: str) -> None:
    spec = job_spec(rendered[name])
    owner = next(made for made in rendered[name] if made["kind"] in ("Job", "JobSet"))
    assert set(apart(spec).values()) == {owner["metadata"]["name"]}, "only pods of its own run"
    (spread,) = spec["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == (
        "kubernetes.io/hostname",
        "ScheduleAnyway",
    )
    assert spread["labelSelector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    resources = container(rendered[name])["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize("name", JOBS)
def test_pods_are_named_by_the_service(rendered: dict[str, list[Object]], name: str) -> None:
    service, job = one(rendered[name], "Service"), one(rendered[name], "Job")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    named = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": named}, "no other run's pods"
    assert service["metadata"]["name"] == named == job["spec"]["template"]["spec"]["subdomain"]


def test_the_documented_changes(alice: list[Object]) -> None:
    args, config = launch(alice)
    assert config is None
    assert (args.config, args.nodes) == ("/configs/my.yaml", "6:8")
    assert "optimizer.lr=2e-4" in args.overrides
    assert "run=/runs/alice" in args.overrides
    job, service = one(alice, "Job"), one(alice, "Service")
    name = "alice-dit-scale-xl2-256"
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == (name, "research")
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"] == name
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 8
    assert container(alice)["image"] == "registry.example.com/dit-scale:0.2.0"
    (mounted,) = (v["configMap"]["name"] for v in pod_spec(alice)["volumes"] if "configMap" in v)
    (configs,) = (made for made in alice if made["metadata"]["name"] == mounted)
    assert configs["data"] == {"my.yaml": "steps: 5\n"}


def test_more_nodes_with_infiniband(tmp_path: Path) -> None:
    made = written(tmp_path, example(OVERLAYS / "xl2_512/kustomization.yaml"))
    args, config = launch(made)
    assert config is not None
    least, most = node_range(args.nodes)
    assert (most, most) == (job_spec(made)["completions"], job_spec(made)["parallelism"])
    for nodes in (least, most):
        assert config.global_batch % (8 * nodes) == 0
    limits = container(made)["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["rdma/hca"]) == ("8", "1")
    kubernetes_validate.validate(one(made, "Job"), "1.37", strict=True)


def test_the_network_is_set_as_on_slurm(rendered: dict[str, list[Object]]) -> None:
    text = (ROOT / "cluster/nccl_env.sh").read_text()
    expected = dict(re.findall(r'^export (\w+)="\$\{\w+:-(.*)\}"$', text, re.MULTILINE))
    assert len(expected) == 5
    for name in NAMES:
        known = variables(container(rendered[name]), {"batch.kubernetes.io/job-name": "job"}, rendered[name])
        assert expected.items() <= known.items()


def test_checkpoints_on_s3(tmp_path: Path) -> None:
    text = example(KUBERNETES / "components/checkpoints_on_s3/kustomization.yaml")
    made = written(tmp_path, f"resources: [../cluster/kubernetes/overlays/xl2_512]\n{text}")
    _, config = launch(made)
    assert config is not None
    assert config.checkpoint.url == "s3://bucket/runs/xl2"
    (runs,) = (volume for volume in pod_spec(made)["volumes"] if volume["name"] == "runs")
    assert set(runs) == {"name", "emptyDir"}
    kubernetes_validate.validate(one(made, "Job"), "1.37", strict=True)


def test_a_users_own_jobset(tmp_path: Path) -> None:
    """The names of its ConfigMaps get the prefix too."""
    made = written(tmp_path, "resources: [../cluster/kubernetes/overlays/xl2_512_jobset]\nnamePrefix: bob-\n")
    assert one(made, "JobSet")["metadata"]["name"] == "bob-dit-scale-xl2-512"
    _, config = launch(made)
    assert config is not None
    (mounted,) = (v["configMap"]["name"] for v in pod_spec(made)["volumes"] if "configMap" in v)
    assert mounted in [found["metadata"]["name"] for found in made]
    assert set(apart(job_spec(made)).values()) == {"bob-dit-scale-xl2-512"}


@pytest.mark.parametrize("name", NAMES)
def test_kueue_admits_it(tmp_path: Path, name: str) -> None:
    text = example(KUBERNETES / "components/kueue/kustomization.yaml")
    made = written(tmp_path, f"resources: [../cluster/kubernetes/overlays/{name}]\n{text}")
    owner = next(found for found in made if found["kind"] in ("Job", "JobSet"))
    assert owner["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert owner["spec"]["suspend"] is True
    assert container(made)["resources"]["requests"], "Kueue counts the requests"
    if owner["kind"] == "Job":
        kubernetes_validate.validate(owner, "1.28", strict=True)
    else:
        assert "suspend" not in job_spec(made), "the JobSet has its own field"
        owner["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"] = {
            "containers": [{"name": "a"}]
        }
        assert JobsetV1alpha2JobSet.model_validate(owner).to_dict() == owner


@pytest.mark.parametrize("name", NAMES)
def test_pod_identity(tmp_path: Path, name: str) -> None:
    text = example(KUBERNETES / "components/identity/kustomization.yaml")
    made = written(tmp_path, f"resources: [../cluster/kubernetes/overlays/{name}]\nnamePrefix: bob-\n{text}")
    pod = pod_spec(made)
    assert pod["imagePullSecrets"] == [{"name": "dit-scale-registry"}]
    assert pod["serviceAccountName"] == pod["priorityClassName"] == "dit-scale"
    template = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod}
    kubernetes_validate.validate(template, "1.28", strict=True)


def test_the_volume_is_not_part_of_a_job() -> None:
    """Deleting a job with everything it owns must keep the runs."""
    claim = yaml.safe_load((KUBERNETES / "volume.yaml").read_text())
    kubernetes_validate.validate(claim, "1.37", strict=True)
    assert claim["metadata"]["name"] == "dit-scale-runs"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for path in KUBERNETES.rglob("kustomization.yaml"):
        assert "volume.yaml" not in re.sub("#.*", "", path.read_text())


def test_the_image_has_what_the_jobs_use() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    (packages,) = re.findall('^ARG DEBIAN="(.*)"', text, re.MULTILINE)
    assert {"bash", "ibverbs-providers", "libibverbs1", "tini", "wget"} <= set(packages.split())
    assert f"COPY . {IN_IMAGE}" in text
    assert "USER 1000:1000" in text
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {"configs", "data_pipeline", "dit_scale", "constraints.txt", "pyproject.toml"} <= set(kept)
    assert all((ROOT / path).exists() for path in kept)


@pytest.mark.parametrize("name", NAMES)
def test_pods_that_serve_metrics(tmp_path: Path, name: str) -> None:
    text = example(KUBERNETES / "components/metrics/kustomization.yaml")
    made = written(tmp_path, f"resources: [../cluster/kubernetes/overlays/{name}]\n{text}")
    args, config = launch(made)
    assert config is not None
    assert args.metrics_port == 9470
    (port,) = container(made)["ports"]
    pod = job_spec(made)["template"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"]) == "9470"
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": job_spec(made)}
    kubernetes_validate.validate(job, "1.37", strict=True)
