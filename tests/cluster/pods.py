"""Real pods for tests: podman runs them, and this plays the Job controller and the kubelet's part beside it.

    with running(objects, Node(folder, {"dit-scale-runs": folder / "runs"})) as job:
        job.until(lambda: job.succeeded == {0, 1})

One pod for each index on a network of their own, named as a headless service names it. An ended pod is
judged by the Job's podFailurePolicy and replaced, as by Kubernetes. What podman leaves out is done
here: $(VARIABLE) in arguments, folders of emptyDir with mode 777, a claim bound to a folder.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.needs import needs

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "podman": "podman",
    "runc": "runc",
    "iptables": "iptables",
    "debootstrap": "debootstrap",
}
"""Program => the Debian package that has it. podman further wants netavark aardvark-dns conmon catatonit."""
BASE = "localhost/dit-scale-test-base"
IMAGE = "localhost/dit-scale-test"
IMAGE_VARIABLE = "DIT_SCALE_TEST_IMAGE"
"""An image that was built with its packages; otherwise one is built that takes them from this environment."""
WAIT_S = 300.0
MOST_ENDS = 10
"""Pods that end so often do nothing else."""
Object = dict[str, Any]


class PodError(Exception):
    """podman, or a pod, did not do what it should."""


def podman(*arguments: str, stdin: str | None = None, timeout_s: float = WAIT_S) -> str:
    """What a command of podman prints."""
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as limits:
        # its own default is above what a container may be given inside another one
        limits.write('[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n')
        limits.flush()
        ran = subprocess.run(
            ["podman", "--runtime", "runc", *arguments],
            input=stdin,
            env=os.environ | {"CONTAINERS_CONF": limits.name},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    if ran.returncode:
        raise PodError(f"podman {' '.join(arguments)}: {ran.stderr[-2000:]}")
    return ran.stdout.strip()


def build_image() -> str:
    """The image of cluster/Dockerfile, on a Debian made here, with the packages of this environment."""
    missing = sorted(package for program, package in PACKAGES.items() if not shutil.which(program))
    needs(not missing and os.geteuid() == 0, f"root, and apt-get install {' '.join(missing)}")
    if image := os.environ.get(IMAGE_VARIABLE):
        return image
    if not podman("images", "--quiet", BASE):
        _make_base()
    with tempfile.TemporaryDirectory() as folder:
        programs = Path(folder) / "opt/venv/bin"
        programs.mkdir(parents=True)
        for program in (Path(sys.prefix) / "bin").iterdir():
            (programs / program.name).symlink_to(program)
        podman(
            *("build", "--network=none", "--pull=never", "--file", str(ROOT / "cluster/Dockerfile")),
            *("--build-arg", f"BASE={BASE}", "--build-context", f"packages={folder}"),
            *("--tag", f"{IMAGE}:latest", str(ROOT)),
        )
    return f"{IMAGE}:latest"


def _make_base() -> None:
    """A Debian with the packages that the Dockerfile would otherwise fetch."""
    found = re.search('^ARG DEBIAN="(.*)"', (ROOT / "cluster/Dockerfile").read_text(), re.MULTILINE)
    assert found
    with tempfile.TemporaryDirectory() as folder:
        packages = found[1].replace(" ", ",")
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", folder]
        made = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if made.returncode:
            raise PodError(f"debootstrap: {made.stdout[-2000:]}")
        # an interpreter may lie there, and pods do not run as root
        (Path(folder) / "root").chmod(0o755)
        with tempfile.NamedTemporaryFile(suffix=".tar") as tar:
            subprocess.run(["tar", "-C", folder, "-cf", tar.name, "."], check=True)
            podman("import", tar.name, BASE)


@dataclass(frozen=True)
class Node:
    """What the only node of these pods has."""

    folder: Path
    claims: Mapping[str, Path]
    """Folder of each persistent volume claim."""

    def volume(self, pod: str, volume: Object) -> Object:
        """A volume of a pod as one that podman knows."""
        if "emptyDir" in volume:
            path = self.folder / pod / volume["name"]
            path.mkdir(parents=True)
        elif "persistentVolumeClaim" in volume:
            path = self.claims[volume["persistentVolumeClaim"]["claimName"]]
        else:
            return volume
        path.chmod(0o777)
        return {"name": volume["name"], "hostPath": {"path": str(path), "type": "Directory"}}


@dataclass(frozen=True)
class Pod:
    """A pod of the job."""

    index: int
    name: str

    @property
    def container(self) -> str:
        return f"{self.name}-train"

    def kill(self) -> None:
        """As the kernel does it for want of memory: nothing is said."""
        podman("kill", "--signal", "KILL", self.container)

    def log(self) -> str:
        """Both its outputs; podman keeps them apart."""
        command = ["podman", "logs", self.container]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    def pid(self) -> int:
        """Of its first process, on this host."""
        return int(podman("inspect", "--format", "{{.State.Pid}}", self.container))

    def exit_code(self) -> int | None:
        """None while it runs."""
        (state,) = json.loads(podman("inspect", "--format", "json", self.container))
        if state["State"]["Status"] not in ("exited", "stopped"):
            return None
        return int(state["State"]["ExitCode"])


@dataclass
class IndexedJob:
    """An Indexed Job, its pods, and what became of them."""

    job: Object
    others: Sequence[Object]
    node: Node
    network: str
    pods: dict[int, Pod] = field(default_factory=dict)
    ended: list[tuple[int, int, str]] = field(default_factory=list)
    """(index, exit code, what the policy made of it), in order."""
    succeeded: set[int] = field(default_factory=set)
    _started: int = 0

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])

    def start(self, index: int) -> None:
        """A new pod of an index, with a name of its own and the host name of the index."""
        self._started += 1
        host, service = f"{self.name}-{index}", self.job["spec"]["template"]["spec"]["subdomain"]
        pod = self._pod(index, f"{host}-{self._started}", host)
        documents = yaml.safe_dump_all([*(o for o in self.others if o["kind"] == "ConfigMap"), pod])
        podman("kube", "play", "--network", f"{self.network}:alias={host}.{service}", "-", stdin=documents)
        self.pods[index] = Pod(index, pod["metadata"]["name"])

    def _pod(self, index: int, name: str, host: str) -> Object:
        template = copy.deepcopy(self.job["spec"]["template"])
        labels = template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": self.name}
        spec = template["spec"]
        spec["hostname"] = host
        (container,) = spec["containers"]
        container["env"].append({"name": "JOB_COMPLETION_INDEX", "value": str(index)})
        known = variables(container, labels, self.others)
        container["args"] = [expand(text, known) for text in container["args"]]
        spec["volumes"] = [self.node.volume(name, volume) for volume in spec["volumes"]]
        if IMAGE_VARIABLE not in os.environ:
            for number, path in enumerate(_environment_folders()):
                spec["volumes"].append({"name": f"env{number}", "hostPath": {"path": path}})
                container["volumeMounts"].append(
                    {"name": f"env{number}", "mountPath": path, "readOnly": True}
                )
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": spec,
        }

    def evict(self, index: int) -> int:
        """Drain its node: SIGTERM, the grace period, SIGKILL; the exit code. Its pod is replaced."""
        pod = self.pods[index]
        grace_s = self.job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        podman("stop", "--time", str(grace_s), pod.container, timeout_s=grace_s + 60)
        code = pod.exit_code()
        assert code is not None
        self._replace(pod, code, disrupted=True)
        return code

    def control(self) -> None:
        """Judge and replace what has ended."""
        for pod in list(self.pods.values()):
            if pod.index not in self.succeeded and (code := pod.exit_code()) is not None:
                self._replace(pod, code, disrupted=False)

    def _replace(self, pod: Pod, code: int, disrupted: bool) -> None:
        action = verdict(self.job["spec"]["podFailurePolicy"], code, disrupted)
        self.ended.append((pod.index, code, action))
        (self.node.folder / f"{pod.name}.log").write_text(pod.log())
        if action == "Succeeded":
            self.succeeded.add(pod.index)
        elif action == "FailJob" or len(self.ended) > MOST_ENDS:
            raise PodError(f"{pod.name} ended, {action}: {self.ended}\n{pod.log()[-3000:]}")
        else:
            self.start(pod.index)

    def until(self, there: Callable[[], bool], what: str) -> None:
        """Play the controller until something is the case."""
        end_s = time.monotonic() + WAIT_S
        while not there():
            if time.monotonic() > end_s:
                logs = "\n".join(f"{pod.name}: {pod.log()[-3000:]}" for pod in self.pods.values())
                raise PodError(f"not within {WAIT_S:.0f} s: {what}; {self.ended}\n{logs}")
            self.control()
            time.sleep(0.2)


def verdict(policy: Object, code: int, disrupted: bool) -> str:
    """What the Job controller makes of a pod that ended: the first rule that fits, or the backoff limit."""
    if code == 0:
        return "Succeeded"
    for rule in policy["rules"]:
        if rule.get("onPodConditions"):
            if disrupted:
                return str(rule["action"])
            continue
        assert rule["onExitCodes"]["operator"] == "In"
        if code in rule["onExitCodes"]["values"]:
            return str(rule["action"])
    return "Count"


@contextmanager
def running(objects: Sequence[Object], node: Node) -> Iterator[IndexedJob]:
    """Start all pods of the only Job among these objects; end them and their network."""
    (job,) = (found for found in objects if found["kind"] == "Job")
    network = f"dit-test-{os.getpid()}-{time.monotonic_ns()}"
    podman("network", "create", network)
    indexed = IndexedJob(job, [made for made in objects if made["kind"] == "ConfigMap"], node, network)
    try:
        for index in range(job["spec"]["completions"]):
            indexed.start(index)
        yield indexed
    finally:
        names = podman("pod", "ls", "--filter", f"network={network}", "--format", "{{.Name}}").split()
        for name in names:
            podman("pod", "rm", "--force", "--time", "0", name)
        podman("network", "rm", "--force", network)


def variables(container: Object, labels: Mapping[str, str], objects: Sequence[Object]) -> dict[str, str]:
    """The environment of a container, as far as ConfigMaps, labels and literals give it."""
    maps = {made["metadata"]["name"]: made.get("data", {}) for made in objects if made["kind"] == "ConfigMap"}
    names = [entry["configMapRef"]["name"] for entry in container["envFrom"] if "configMapRef" in entry]
    found = {key: value for name in names for key, value in maps[name].items()}
    for entry in container["env"]:
        if "value" in entry:
            found[entry["name"]] = entry["value"]
        else:
            label = entry["valueFrom"]["fieldRef"]["fieldPath"].partition("'")[2].partition("'")[0]
            found[entry["name"]] = labels[label]
    return found


def expand(text: str, known: Mapping[str, str]) -> str:
    """$(VARIABLE) as the kubelet does it."""
    return re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], text)


def _environment_folders() -> list[str]:
    """Where this environment and its interpreter lie; /usr is the image's own."""
    return [path for path in dict.fromkeys((sys.prefix, sys.base_prefix)) if path != "/usr"]
