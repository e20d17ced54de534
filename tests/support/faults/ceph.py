"""A real S3 server on loopback for tests: Ceph's RADOS Gateway with one monitor and one OSD in memory."""

import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support.faults.ports import free_port
from tests.support.needs import needs
from tests.support.s3 import BUCKET, make_bucket
from tests.support.speed import scaled

PACKAGES = {
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "radosgw": "radosgw",
    "radosgw-admin": "radosgw",
    "ceph": "ceph-common",
    "ceph-authtool": "ceph-common",
    "monmaptool": "ceph-base",
}
"""Program => its Debian package."""
ACCESS_KEY, SECRET_KEY = "storm", "storm-secret"
START_S = scaled(400.0)

CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 10000
run_dir = {folder}/run
admin_socket = {folder}/run/$name.asok
keyring = {folder}/keyring
log_file = {folder}/log/$name.log
[mon.a]
mon_data = {folder}/mon
mon_data_avail_crit = 1
mon_data_avail_warn = 1
# Every new pool is a round of the monitor, which by default waits a second for others to join it.
paxos_propose_interval = 0.05
[osd.0]
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = 2147483648
[client.rgw]
rgw_data = {folder}/rgw
# Without tcp_nodelay every small answer waits 40 ms for an acknowledgement.
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_thread_pool_size = 64
"""


@dataclass(frozen=True)
class CephServer:
    """A running gateway with the empty bucket `tests.support.s3.BUCKET`."""

    port: int
    environment: dict[str, str]
    """The environment variables that point boto3 at it."""
    gateway: "subprocess.Popen[bytes]"
    """The process that answers, for tests that stop it for a while."""
    admin: Callable[..., None]
    """Runs radosgw-admin with these arguments: users and quotas."""


@contextmanager
def ceph_s3() -> Iterator[CephServer]:
    """Start the server, which takes some seconds; stop it and leave nothing running.

    Skips the test where a program is missing, and fails it where DIT_SCALE_REQUIRE_ALL is 1.
    """
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program)})
    needs(not missing, f"Ceph: apt-get install {' '.join(missing)}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ceph-")))
        try:
            server = _Cluster(folder, stack).start()
        except StartError as error:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log/*")))
            raise StartError(f"{error}\n{logs}") from None
        yield server


class StartError(Exception):
    """A program of Ceph failed."""


class _Cluster:
    """Start the daemons; the stack stops them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.port, self.mon_port, self.fsid = free_port(), free_port(), str(uuid.uuid4())
        for name in ("mon", "osd", "run", "log", "rgw"):
            (folder / name).mkdir()
        text = CONFIGURATION.format(folder=folder, port=self.port, mon_port=self.mon_port, fsid=self.fsid)
        (folder / "ceph.conf").write_text(text)

    def start(self) -> CephServer:
        self._start_monitor()
        self._start_osd()
        admin = partial(self._run, "radosgw-admin", "-n", "client.rgw")
        user = ("--uid=storm", "--display-name=storm", f"--access-key={ACCESS_KEY}")
        admin("user", "create", *user, f"--secret-key={SECRET_KEY}")
        gateway = self._daemon("radosgw", "-n", "client.rgw")
        url = f"http://127.0.0.1:{self.port}"
        _wait_for_answer(url, gateway)
        environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        make_bucket(environment, BUCKET)
        return CephServer(self.port, environment, gateway, admin)

    def _start_monitor(self) -> None:
        keyring, monmap = str(self.folder / "keyring"), str(self.folder / "monmap")
        every = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "client.admin", *every)
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "client.rgw", *every)
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "osd.0", *every)
        address = f"[v2:127.0.0.1:{self.mon_port}]"
        self._run("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._daemon("ceph-mon", "-i", "a")

    def _start_osd(self) -> None:
        name = str(uuid.uuid4())
        self._run("ceph", "osd", "create", name)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", name)
        self._daemon("ceph-osd", "-i", "0")

    def _run(self, *command: str) -> None:
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, timeout=START_S, env=self._environment()
            )
        except subprocess.TimeoutExpired:
            raise StartError(f"{' '.join(command)}: not finished after {START_S:.0f} s") from None
        if ran.returncode:
            raise StartError(f"{' '.join(command)}: {ran.stderr}")

    def _daemon(self, *command: str) -> "subprocess.Popen[bytes]":
        """Start a program in the foreground, as a child that the kernel kills when this process dies."""
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command, "-f"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment(),
        )
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")}


def _wait_for_answer(url: str, gateway: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if gateway.poll() is not None:
            raise StartError(f"radosgw exited with code {gateway.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise StartError(f"radosgw: no answer after {START_S:.0f} s")
