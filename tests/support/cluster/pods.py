"""Real pods for tests: podman runs them, and this module acts as Job controller and kubelet.

    with network() as wire, running(objects, Node(folder, wire, {"dit-scale-runs": folder / "runs"})) as job:
        job.until(lambda: job.succeeded == {0, 1}, "the end of the run")

There is one pod for each index, on a separate network, named as a headless service names it. A pod that exits
is judged by the Job's podFailurePolicy and replaced, as by Kubernetes. This module adds what podman lacks:
the environment and $(VARIABLE) in arguments, emptyDir folders with mode 777, a claim bound to a folder,
secrets.
"""

import copy
import ipaddress
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.cluster.image import WAIT_S, PodError, environment_folders, podman

MOST_ENDS = 10
"""Pods that fail this often never work."""
Object = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A network for pods alone."""

    name: str
    gateway: str
    """Address of this host, as pods see it."""


@dataclass(frozen=True)
class Node:
    """What the only node of these pods provides."""

    folder: Path
    network: Network
    claims: Mapping[str, Path] = field(default_factory=dict)
    """Folder of each persistent volume claim."""
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def volume(self, pod: str, volume: Object) -> Object:
        """Return a volume of a pod in podman's form."""
        if "emptyDir" in volume:
            path = self.folder / pod / volume["name"]
            path.mkdir(parents=True)
        elif "persistentVolumeClaim" in volume:
            path = self.claims[volume["persistentVolumeClaim"]["claimName"]]
        else:
            return volume
        path.chmod(0o777)
        return {"name": volume["name"], "hostPath": {"path": str(path), "type": "Directory"}}


class Pod:
    """A started pod of the job."""

    def __init__(self, index: int, name: str, address: str) -> None:
        self.index, self.name, self.address = index, name, address
        self.container = f"{name}-train"
        self.pid = int(podman("inspect", "--format", "{{.State.Pid}}", self.container))
        """Process id of its first process on this host; 0 when it had already exited."""
        self._process = os.pidfd_open(self.pid) if self.pid else None

    def signal(self, number: signal.Signals) -> None:
        """Signal its first process: SIGTERM like the kubelet, SIGKILL like the kernel out of memory."""
        assert self._process is not None, f"{self.name} has exited"
        signal.pidfd_send_signal(self._process, number)

    def log(self) -> str:
        """Return stdout and stderr, which podman stores separately."""
        command = ["podman", "logs", self.container]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    def has_ended(self, within_s: float = 0.0) -> bool:
        return self._process is None or bool(select.select([self._process], [], [], within_s)[0])

    def exit_code(self) -> int:
        """Return the exit code of a pod that has exited."""
        return int(podman("wait", self.container))

    def forget(self) -> None:
        """Remove the pod; nothing reads it any more."""
        if self._process is not None:
            os.close(self._process)
            self._process = None


@dataclass
class IndexedJob:
    """An Indexed Job, its pods, and what happened to them."""

    job: Object
    others: Sequence[Object]
    node: Node
    pods: dict[int, Pod] = field(default_factory=dict)
    ended: list[tuple[int, int, str]] = field(default_factory=list)
    """(index, exit code, action of the policy), in order."""
    succeeded: set[int] = field(default_factory=set)
    _started: int = 0

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])

    @property
    def grace_s(self) -> float:
        """From SIGTERM to SIGKILL."""
        return float(self.job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"])

    def start(self, index: int) -> None:
        """Start a new pod of an index, with its own name and address and the host name of the index."""
        self._started += 1
        host, service = f"{self.name}-{index}", self.job["spec"]["template"]["spec"]["subdomain"]
        wire = self.node.network
        address = str(ipaddress.ip_address(wire.gateway) + self._started)
        # podman shares one namespace of names among all pods of this machine
        pod = self._pod(index, f"{wire.name}-{index}-{self._started}", host, address)
        documents = yaml.safe_dump_all([*(o for o in self.others if o["kind"] == "ConfigMap"), pod])
        place = f"{wire.name}:ip={address},alias={host}.{service}"
        podman("kube", "play", "--network", place, "-", stdin=documents)
        self.pods[index] = Pod(index, pod["metadata"]["name"], address)

    def _pod(self, index: int, name: str, host: str, address: str) -> Object:
        template = copy.deepcopy(self.job["spec"]["template"])
        labels = template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": self.name}
        spec = template["spec"]
        spec["hostname"] = host
        (container,) = spec["containers"]
        container["env"].append({"name": "JOB_COMPLETION_INDEX", "value": str(index)})
        known = variables(container, labels, self.others, address, self.node.secrets)
        del container["envFrom"]
        container["env"] = [{"name": key, "value": value} for key, value in known.items()]
        container["args"] = [expand(text, known) for text in container["args"]]
        spec["volumes"] = [self.node.volume(name, volume) for volume in spec["volumes"]]
        for number, path in enumerate(environment_folders()):
            spec["volumes"].append({"name": f"env{number}", "hostPath": {"path": path}})
            mount = {"name": f"env{number}", "mountPath": path, "readOnly": True}
            container["volumeMounts"].append(mount)
        metadata = {"name": name, "labels": labels}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

    def evict(self, index: int) -> tuple[int, float]:
        """Drain the pod's node: SIGTERM, the grace period, SIGKILL. The pod is replaced.

        Return its exit code, and how long it took to exit (seconds).
        """
        pod, begin_s = self.pods[index], time.monotonic()
        pod.signal(signal.SIGTERM)
        if not pod.has_ended(within_s=self.grace_s):
            pod.signal(signal.SIGKILL)
        took_s, code = time.monotonic() - begin_s, pod.exit_code()
        self._replace(pod, code, disrupted=True)
        return code, took_s

    def freeze(self, index: int) -> None:
        """Freeze the pod's node: it sends no status and does nothing."""
        podman("pause", self.pods[index].container)

    def delete_node(self, index: int) -> None:
        """The cluster gives up a frozen node and the pod that ran there."""
        pod = self.pods[index]
        pod.signal(signal.SIGKILL)
        podman("unpause", pod.container)
        self._replace(pod, pod.exit_code(), disrupted=True)

    def control(self) -> None:
        """Judge and replace the pods that have exited."""
        for pod in list(self.pods.values()):
            if pod.index not in self.succeeded and pod.has_ended():
                self._replace(pod, pod.exit_code(), disrupted=False)

    def _replace(self, pod: Pod, code: int, disrupted: bool) -> None:
        action = verdict(self.job["spec"]["podFailurePolicy"], code, disrupted)
        self.ended.append((pod.index, code, action))
        (self.node.folder / f"{pod.name}.log").write_text(pod.log())
        pod.forget()
        if action == "Succeeded":
            self.succeeded.add(pod.index)
        elif action == "FailJob" or len(self.ended) > MOST_ENDS:
            raise PodError(f"{pod.name} exited, {action}: {self.ended}\n{pod.log()[-3000:]}")
        else:
            self.start(pod.index)

    def until(self, there: Callable[[], bool], what: str) -> None:
        """Act as the controller until a condition holds."""
        end_s = time.monotonic() + WAIT_S
        while not there():
            if time.monotonic() > end_s:
                logs = "\n".join(f"{pod.name}: {pod.log()[-3000:]}" for pod in self.pods.values())
                raise PodError(f"{what}: not within {WAIT_S:.0f} s; {self.ended}\n{logs}")
            self.control()
            time.sleep(0.05)


def verdict(policy: Object, code: int, disrupted: bool) -> str:
    """Return the Job controller's action for an exited pod: the first matching rule, or the backoff limit."""
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
def network() -> Iterator[Network]:
    """A network for pods."""
    name = f"dit-test-{os.getpid()}-{time.monotonic_ns()}"
    podman("network", "create", name)
    (made,) = json.loads(podman("network", "inspect", name))
    try:
        yield Network(name, made["subnets"][0]["gateway"])
    finally:
        podman("network", "rm", "--force", name)


@contextmanager
def running(objects: Sequence[Object], node: Node) -> Iterator[IndexedJob]:
    """Start all pods of the only Job among these objects; stop them at the end of the block."""
    (job,) = (found for found in objects if found["kind"] == "Job")
    indexed = IndexedJob(job, [found for found in objects if found["kind"] == "ConfigMap"], node)
    try:
        for index in range(job["spec"]["completions"]):
            indexed.start(index)
        yield indexed
    finally:
        for pod in indexed.pods.values():
            pod.forget()
        mine = ("--filter", f"network={node.network.name}")
        if names := podman("pod", "ls", *mine, "--format", "{{.Name}}").split():
            podman("pod", "rm", "--force", "--time", "0", *names)


def variables(
    container: Object,
    labels: Mapping[str, str],
    objects: Sequence[Object],
    address: str = "10.0.0.1",
    secrets: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, str]:
    """Return a container's environment, from ConfigMaps, secrets, literals, labels and the pod's address."""
    sources = {
        made["metadata"]["name"]: made.get("data", {}) for made in objects if made["kind"] == "ConfigMap"
    }
    sources |= secrets or {}
    found: dict[str, str] = {}
    for entry in container["envFrom"]:
        (reference,) = entry.values()
        data = sources.get(reference["name"])
        assert data is not None or reference.get("optional"), f"no {entry}"
        found |= data or {}
    for entry in container["env"]:
        if "value" in entry:
            found[entry["name"]] = entry["value"]
        elif (path := entry["valueFrom"]["fieldRef"]["fieldPath"]) == "status.podIP":
            found[entry["name"]] = address
        else:
            found[entry["name"]] = labels[path.partition("'")[2].partition("'")[0]]
    return found


def expand(text: str, known: Mapping[str, str]) -> str:
    """Expand $(VARIABLE) as the kubelet does."""
    return re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], text)
