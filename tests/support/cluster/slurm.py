"""A real SLURM on one machine for tests: munged, slurmctld and a slurmd for each node.

    with slurm_cluster(nodes=2) as slurm:
        job = slurm.submit("script.sh", "key=value", options=["--nodes=2", "--cpus-per-task=1"])
        assert slurm.wait(job) == ("COMPLETED", 0)

Each node claims the hardware of `Node`, so requests of a real size are judged as on a real cluster; the
processes of a job share this machine. Jobs of the partition `high` preempt those of `low`, which are
requeued. With `cables=True` each node has its own network and can be cut off.
"""

import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.cluster.network import Host, Network, network
from tests.support.faults.ports import free_port
from tests.support.needs import needs
from tests.support.speed import scaled

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "srun": "slurm-client",
}
"""Program => its Debian package."""
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
CONTROL = "control"
"""The host of slurmctld, in a network."""
SLURMD_TIMEOUT_S = round(scaled(30))
"""Longer than a busy machine delays a slurmd."""
CUT_OFF_S = round(scaled(10))
"""The same where a requeued job waits this long for a node that was cut off."""
START_S = scaled(180.0)
WAIT_S = scaled(400.0)

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that was queued again waits so long (at least 5) and a second more; 120 s by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
# Without control groups, which not every host lets a test have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout={slurmd_timeout_s}
KillWait=10
FirstJobId={first_job}
# Nodes have what is claimed below, whatever this machine has.
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
"""
PARTITIONS = """
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Node:
    """What a node claims to have."""

    cpus: int = 64
    gpus: int = 8
    memory_mb: int = 512_000


class SlurmError(Exception):
    """A program of SLURM failed."""


@dataclass(frozen=True)
class Slurm:
    """A running cluster; its nodes are node1, node2, ..."""

    folder: Path
    daemons: "Mapping[str, subprocess.Popen[bytes]]" = field(default_factory=dict)
    """slurmd by node."""
    network: Network | None = None
    """Where every node has its own cable; the controller is the host `control`."""

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that point SLURM's programs here, without others that affect SLURM or Ray."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "RAY_"))
        }
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command; `environment` is added."""
        variables = self.environment | dict(environment or {})
        if self.network:
            command = tuple(self.network.hosts[CONTROL].enter(*command))
        return subprocess.run(
            command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=START_S, check=False
        )

    def submit(
        self,
        script: str | Path,
        *arguments: str,
        options: Sequence[str] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Submit with sbatch; return the job's number."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        ran = self.run(*command, cwd=cwd, environment=environment)
        if ran.returncode:
            raise SlurmError(f"{' '.join(command)}: {ran.stderr}")
        return int(ran.stdout)

    def job(self, job: int) -> dict[str, str]:
        """Return what scontrol shows of a job: JobState, ExitCode, Restarts, ..."""
        ran = self.run("scontrol", "--oneliner", "show", "job", str(job))
        if ran.returncode:
            raise SlurmError(f"job {job}: {ran.stderr}")
        return dict(word.split("=", 1) for word in ran.stdout.split() if "=" in word)

    def wait(self, job: int, state: str = "") -> tuple[str, int]:
        """Wait until a job is in this state or has ended; return its state and exit code."""
        until = time.monotonic() + WAIT_S
        while (found := self.job(job))["JobState"] not in (state, *ENDS):
            if time.monotonic() > until:
                raise SlurmError(f"job {job} is {found['JobState']} ({found['Reason']})")
            time.sleep(0.2)
        return found["JobState"], int(found["ExitCode"].partition(":")[0])

    def kill_daemon(self, node: str) -> None:
        """SIGKILL the slurmd of a node: its steps keep running, and nothing can reach them."""
        self.daemons[node].kill()
        self.daemons[node].wait()

    def declare_down(self, node: str) -> None:
        """Declare what SLURM would detect after SlurmdTimeout."""
        ran = self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
        if ran.returncode:
            raise SlurmError(f"{node}: {ran.stderr}")


def processes(job: int, node: str) -> list[int]:
    """Return the processes of a job on a node, including SLURM's own processes for its steps."""
    found = set()
    for pid in _having({f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}"}):
        with suppress(OSError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            found |= {pid, *_stepd(parent)}
    return sorted(found)


def _having(variables: set[str]) -> Iterator[int]:
    """Return the processes that have these variables, each as NAME=VALUE, in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if variables <= set((folder / "environ").read_bytes().decode(errors="replace").split("\0")):
                yield int(folder.name)


def _stepd(pid: int) -> list[int]:
    return [pid] if Path(f"/proc/{pid}/cmdline").read_text().startswith("slurmstepd") else []


@contextmanager
def slurm_cluster(nodes: int, node: Node | None = None, cables: bool = False) -> Iterator[Slurm]:
    """Start the cluster, which takes some seconds; stop its jobs and daemons afterwards.

    Skips the test where a program is missing, and fails it where DIT_SCALE_REQUIRE_ALL is 1.
    """
    missing = sorted({package for program, package in PACKAGES.items() if not _find(program)})
    needs(not missing, f"SLURM: apt-get install {' '.join(missing)}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        names = [f"node{number}" for number in range(1, nodes + 1)]
        net = stack.enter_context(network([CONTROL, *names], folder)) if cables else None
        daemons = _Daemons(folder, stack, net)
        try:
            daemons.start(names, node or Node())
            slurm = Slurm(folder, daemons.by_node, net)
            _wait_for_nodes(slurm, nodes)
        except SlurmError as error:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log/*")))
            raise SlurmError(f"{error}\n{logs}") from None
        stack.callback(_end_jobs, slurm)
        yield slurm


class _Daemons:
    """Start the daemons; the stack stops them."""

    def __init__(self, folder: Path, stack: ExitStack, net: Network | None) -> None:
        self._folder, self._stack = folder, stack
        self._hosts: Mapping[str, Host] = net.hosts if net else {}
        self.by_node: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, names: Sequence[str], node: Node) -> None:
        folder = self._folder
        folder.chmod(0o755)
        for name in ("state", "log", "munge"):
            (folder / name).mkdir()
        self._configure(names, node)
        key = folder / "munge/key"
        key.write_bytes(random.randbytes(1024))
        key.chmod(0o400)
        files = [f"--{kind}-file={folder}/munge/{kind}" for kind in ("key", "pid", "seed")]
        # --force: munged refuses to run as root otherwise
        self._daemon(
            "munged", "--foreground", "--force", *files, f"--socket={folder}/munge/socket", log="munged.log"
        )
        _wait_for(lambda: (folder / "munge/socket").exists(), "munged made no socket")
        configuration = ["-D", "-f", str(folder / "slurm.conf")]
        self._daemon("slurmctld", *configuration, "-i", host=CONTROL)
        for name in names:
            self.by_node[name] = self._daemon("slurmd", *configuration, "-N", name, host=name)

    def _configure(self, names: Sequence[str], node: Node) -> None:
        folder = self._folder
        here = Host(socket.gethostname().partition(".")[0], "127.0.0.1", os.getpid())
        control = self._hosts.get(CONTROL, here)
        ports = _free_ports(len(names) + 1)
        text = CONFIGURATION.format(
            folder=folder,
            host=control.name,
            address=control.address,
            port=ports[0],
            user=getpass.getuser(),
            slurmd_timeout_s=CUT_OFF_S if self._hosts else SLURMD_TIMEOUT_S,
            first_job=random.SystemRandom().randrange(1, 10**6),
        )
        for name, port in zip(names, ports[1:], strict=True):
            (folder / f"spool-{name}").mkdir()
            host = self._hosts.get(name, here)
            text += (
                f"NodeName={name} NodeHostname={host.name} NodeAddr={host.address} Port={port} "
                f"CPUs={node.cpus} RealMemory={node.memory_mb} Gres=gpu:{node.gpus}\n"
            )
        (folder / "slurm.conf").write_text(text + PARTITIONS)
        for number in range(node.gpus):
            (folder / f"nvidia{number}").symlink_to("/dev/null")  # slurmd requires a device
        gpus = f"Name=gpu File={folder}/nvidia[0-{node.gpus - 1}]\n" if node.gpus else ""
        (folder / "gres.conf").write_text(gpus)

    def _daemon(
        self, program: str, *arguments: str, host: str = "", log: str | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a program in the foreground, as a child that the kernel kills when this process dies."""
        path = _find(program)
        assert path is not None
        command = [path, *arguments]
        if host in self._hosts:
            command = self._hosts[host].enter(*command)
        with open(self._folder / "log" / (log or f"{program}.out"), "ab") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RAY_"))},
            )
        self._stack.callback(_end, process)
        return process


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(timeout=2)
    except subprocess.TimeoutExpired:  # a slurmd may not listen
        daemon.kill()
        daemon.wait()


def _end_jobs(slurm: Slurm) -> None:
    """Check that no job is left, nor any process of one that the daemons could not kill."""
    for host in slurm.network.hosts if slurm.network else ():
        slurm.network.mend(host)
    slurm.run("scancel", f"--user={getpass.getuser()}")
    try:
        _wait_for(lambda: not slurm.run("squeue", "--noheader").stdout.strip(), "jobs do not end")
    finally:
        mark = f"SLURM_CONF={slurm.folder}/slurm.conf"
        for pid in _having({mark}):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _wait_for_nodes(slurm: Slurm, nodes: int) -> None:
    def idle() -> bool:
        states = slurm.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T").stdout.split()
        return states == ["idle"] * nodes

    _wait_for(idle, "the nodes do not come up")


def _wait_for(there: Callable[[], bool], error: str) -> None:
    until = time.monotonic() + START_S
    while not there():
        if time.monotonic() > until:
            raise SlurmError(f"{error} within {START_S:.0f} s")
        time.sleep(0.05)


def _find(program: str) -> str | None:
    """Return a program's path; daemons are often in folders outside the user's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    """Return distinct ports on which nothing listens."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)
