"""An encoding job on two Ray nodes that writes to S3, with random processes killed and restarted."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dit_scale import cli
from dit_scale.storage import open_storage
from dit_scale_pipeline.metrics import METRICS_KEY
from dit_scale_pipeline.tasks import MAX_LOSSES
from tests.support.encoding import clean_environment, job_command, objects, write_images
from tests.support.faults.ceph import CephServer
from tests.support.faults.proxy import FaultProxy
from tests.support.faults.ray_nodes import HEAD, SECOND, RayNodes, ray_nodes
from tests.support.s3 import BUCKET
from tests.support.speed import scaled
from tests.support.tiny_vae import save_tiny_vae

IMAGES, SHARD_SAMPLES, VAE_BATCH = 80, 8, 4
NUM_SHARDS = -(-(IMAGES + 1) // SHARD_SAMPLES)
"""One additional input is not an image."""
CONFIG = f"""\
image_size: 256
shard_samples: {SHARD_SAMPLES}
vae_batch: {VAE_BATCH}
max_quarantined: 0.2
cpus_per_encoder: 0.5
"""
CPUS = 2.0
"""CPUs of each node as declared to Ray; the machine may have fewer."""
MANY = ("encoders=3", "decoders=3")
FEW = ("encoders=1", "decoders=1")
RUN_S = scaled(600.0)
"""Far more than a job needs: a longer one hangs."""
TASKS = {"decoder": "ray::decode", "encoder": "ray::encode", "writer": "ray::write"}
"""Victim => name of its process while it works."""
VICTIMS = {"encoder": 8, "decoder": 6, "writer": 4, "driver": 5, "node": 2, "head": 1}
"""Victim => weight of its selection."""
DRIVER_ENDS = (-signal.SIGKILL, 2, 0)
"""Exit codes of a driver: killed, cluster lost, or finished earlier."""
PATIENCE_S = 3.0
"""Time within which a working victim must appear; after that, any working process is killed."""
LONGEST_PAUSE_S = 3.0


class HuntError(Exception):
    """The job violated a guarantee."""


@dataclass(frozen=True)
class Put:
    """Identity of the write that created an object; every writer has its own name."""

    etag: str
    modified: str
    writer: str


@dataclass
class Grounds:
    """What all jobs share: images, VAE, S3 server behind a proxy, Ray cluster, expected objects."""

    folder: Path
    proxy: FaultProxy
    nodes: RayNodes
    s3: Any
    """A client that bypasses the proxy."""
    baseline: "subprocess.Popen[bytes]"

    def expected(self) -> dict[str, bytes]:
        """Return the objects written to disk by one undisturbed encoder."""
        assert self.baseline.wait(RUN_S) == 0, (self.folder / "baseline.log").read_text()
        return objects(self.folder / "baseline")


@contextmanager
def grounds(folder: Path, ceph: CephServer) -> Iterator[Grounds]:
    """Start everything, and stop it at the end of the block."""
    import boto3

    write_images(folder / "images", IMAGES)
    (folder / "images/n0/damaged.jpg").write_bytes(b"no picture")
    save_tiny_vae(folder / "vae")
    (folder / "config.yaml").write_text(CONFIG)
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, ceph.environment))
        s3 = stack.enter_context(closing(boto3.client("s3")))
        proxy = stack.enter_context(FaultProxy(ceph.port))
        through_proxy = ceph.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        baseline = _undisturbed(folder)
        stack.callback(baseline.wait)
        stack.callback(baseline.terminate)
        nodes = stack.enter_context(ray_nodes(clean_environment(**through_proxy), CPUS))
        yield Grounds(folder, proxy, nodes, s3, baseline)


def _undisturbed(folder: Path) -> "subprocess.Popen[bytes]":
    """Start the undisturbed job: on its own Ray, with one encoder."""
    with (folder / "baseline.log").open("wb") as log:
        return subprocess.Popen(
            command(folder, folder / "baseline", "ray_address=local", *FEW),
            env=clean_environment(),
            stdout=log,
            stderr=log,
        )


def command(folder: Path, output: str | Path, *overrides: str) -> list[str]:
    paths = [f"source={folder}/images", f"vae={folder}/vae", f"output={output}"]
    return job_command("--config", folder / "config.yaml", *paths, *overrides)


@dataclass
class Hunt:
    """One output: its drivers, the kills and the objects seen so far."""

    grounds: Grounds
    name: str
    drivers: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    seen: dict[str, Put] = field(default_factory=dict)
    blows: int = 0
    """Kills since the start of the last driver."""

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.name}"

    def start(self, *overrides: str) -> "subprocess.Popen[bytes]":
        """Start a driver with its own log file."""
        with self._log(len(self.drivers)).open("wb") as log:
            driver = subprocess.Popen(
                command(self.grounds.folder, self.url, *overrides),
                env=self.grounds.nodes.driver_environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.drivers.append(driver)
        self.blows = 0
        return driver

    def said(self, driver: int = -1) -> str:
        return self._log(driver % len(self.drivers)).read_text()

    def finish(self) -> None:
        """Wait for the last driver, which must succeed."""
        try:
            code = self.drivers[-1].wait(RUN_S)
        except subprocess.TimeoutExpired:
            raise HuntError(f"the driver hangs:\n{self.said()}") from None
        if code:
            raise HuntError(f"the driver exited with {code}:\n{self.said()}")
        self._check_words()
        self.look()

    def _check_words(self) -> None:
        """HuntError if the last driver has printed more than short messages."""
        if "Traceback" in self.said() or "[state-dump]" in self.said():
            raise HuntError(f"the driver shows a stack or a log:\n{self.said()}")

    def close(self) -> None:
        """Kill the drivers that are still alive."""
        for driver in self.drivers:
            with suppress(ProcessLookupError):
                driver.kill()
            driver.wait()

    def look(self) -> None:
        """HuntError when a known object is missing or was written again."""
        now = dict(self._puts())
        for key, put in self.seen.items():
            if now.get(key) != put:
                raise HuntError(f"{key} was written again: {now.get(key)}, before {put}")
        self.seen = now

    def compare(self) -> None:
        """HuntError unless the objects are intact and equal to those of the undisturbed job."""
        expected, found = self.grounds.expected(), objects(open_storage(self.url))
        if found.keys() != expected.keys():
            raise HuntError(f"other objects: {sorted(found.keys() ^ expected.keys())}")
        if differing := [key for key, data in expected.items() if found[key] != data]:
            raise HuntError(f"other bytes: {differing}")
        if cli.main(["latents", "verify", self.url]):
            raise HuntError("`dit-scale latents verify` reports damage")

    def shards_done(self) -> int:
        return sum(key.endswith(".json") for key in self.seen if key.startswith("shards/"))

    def strike(self, victim: str, draws: random.Random) -> str | None:
        """Kill a working victim, or else another working process; return its kind, None if all is done."""
        if victim in ("node", "head"):
            for node in (SECOND,) if victim == "node" else (HEAD, SECOND):
                self.grounds.nodes.kill(node)
        elif victim == "driver":
            self.drivers[-1].kill()
        elif (victim := self._kill_worker(victim, draws)) is None:
            return None
        self.kills[victim] += 1
        self.blows += 1
        return victim

    def _kill_worker(self, victim: str, draws: random.Random) -> str | None:
        end_s = time.monotonic() + PATIENCE_S
        while self.drivers[-1].poll() is None:
            late = time.monotonic() > end_s
            for kind, name in TASKS.items():
                found = self.grounds.nodes.processes(name=name) if late or kind == victim else {}
                if found:
                    with suppress(ProcessLookupError):
                        os.kill(draws.choice(sorted(found)), signal.SIGKILL)
                    return kind
        return None

    def recover(self, victim: str, *overrides: str) -> None:
        """Restart what an operator or a scheduler would, and the driver if it has exited."""
        nodes = self.grounds.nodes
        driver = self.drivers[-1]
        if victim in ("driver", "head"):
            with suppress(subprocess.TimeoutExpired):
                driver.wait(RUN_S)
            if driver.returncode not in DRIVER_ENDS:
                raise HuntError(f"the driver exited with {driver.returncode}:\n{self.said()}")
            self._check_words()
        if victim == "head":
            nodes.start(HEAD)
        if victim in ("node", "head"):
            nodes.start(SECOND)
        if victim in ("driver", "head"):
            self.start(*overrides)

    def _puts(self) -> Iterator[tuple[str, Put]]:
        s3, prefix = self.grounds.s3, f"{self.name}/"
        for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ()):
            key = entry["Key"].removeprefix(prefix)
            if key != METRICS_KEY:
                head = s3.head_object(Bucket=BUCKET, Key=entry["Key"])
                yield key, Put(head["ETag"], str(head["LastModified"]), head["Metadata"].get("writer", ""))

    def _log(self, driver: int) -> Path:
        return self.grounds.folder / f"{self.name}.{driver}.log"


def hunt_at_random(hunt: Hunt, draws: random.Random, most: int, victims: dict[str, int] = VICTIMS) -> None:
    """Follow a job to its end with at most `most` kills; `victims` maps kinds to weights."""
    while sum(hunt.kills.values()) < most:
        victim = draws.choices(list(victims), list(victims.values()))[0]
        if hunt.blows == MAX_LOSSES:
            victim = "driver"  # all may have hit the same batch, and one more would fail the job
        with suppress(subprocess.TimeoutExpired):
            hunt.drivers[-1].wait(draws.uniform(0, LONGEST_PAUSE_S))
        if hunt.drivers[-1].poll() is not None or not (struck := hunt.strike(victim, draws)):
            break
        hunt.recover(struck, *MANY)
        hunt.look()
    hunt.finish()
