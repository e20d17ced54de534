"""The Ray cluster of an encoding job: joined or started, waited for, and filled with encoders."""

import _thread
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import dit_scale
from dit_scale import signals
from dit_scale.config import EncodeConfig
from dit_scale.data.shards import VaeIdentity
from dit_scale.errors import DeviceError, DitScaleError
from dit_scale_pipeline import ray_start
from dit_scale_pipeline.encoder import Encoder

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

PACKAGES = (Path(dit_scale.__file__).resolve().parent, Path(__file__).resolve().parent)
"""The code of this process, which workers run too."""

PATIENCE_S = 20.0
"""Time after which a job that waits for its encoders says so."""
CONNECT_S = 20.0
"""Time in which the head of a cluster must answer; Ray tries for a quarter of an hour."""
PING_S = 2.0
"""Time between two looks whether the head is there."""
HEAD_LOST_S = 40.0
"""Time without the head after which the job ends; after 60 s Ray ends the process, whatever it does."""
NODE_LOST_S = 6.0
"""The same for the node that this process has joined, which cannot be joined a second time."""

Resources = Sequence[dict[str, float]]
"""What each living node has: CPU, GPU, ..."""


class LostError(Exception):
    """Ray gave up a task, or lost what it had made."""


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """Join a Ray cluster or start a local one; what was started here is ended here.

    DeviceError when it cannot be joined, and when it is lost on the way.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns at every start
    address = os.environ.get("RAY_ADDRESS", "local") if address == "auto" else address
    how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        roots = [str(package.parent) for package in PACKAGES]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*roots, os.environ.get("PYTHONPATH")]))
        how["include_dashboard"] = False
    else:
        # What becomes of a lost node's work is told by the flow; Ray writes pages about it.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        _wait_for_head(address)
        how["runtime_env"] = {"py_modules": [str(package) for package in PACKAGES]}
    with ExitStack() as stack:
        over = threading.Event()
        stack.callback(ray.shutdown)
        stack.callback(over.set)  # first: the node goes away during the shutdown and must not count as lost
        try:
            with _late_interrupts():
                (ray_start.init if address == "local" else ray.init)(**how)
        except (ConnectionError, ValueError) as error:
            raise DeviceError(f"no Ray cluster at {address}: {error}") from None
        lifeline = _Lifeline(address, over)
        try:
            yield
        except RayTaskError:
            raise  # a fault of the code that ran there
        except (RayError, OSError, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not lifeline.cut:
                raise
            raise lifeline.error from error


@contextmanager
def _late_interrupts() -> Iterator[None]:
    """Ctrl-C, a scheduler's SIGTERM and their like wait for the end of the block, and interrupt from then on.

    Within it Ray would set a handler of its own, which leaves processes of a half started Ray behind.
    """
    came: list[int] = []
    for number in signals.caught():
        signal.signal(number, lambda number, _: came.append(number))
    set_handler = signal.signal
    signal.signal = lambda number, handler: signal.getsignal(number)  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_handler
        signals.interrupt()
    if came:
        raise KeyboardInterrupt


def _wait_for_head(address: str) -> None:
    """DeviceError when nothing listens at host:port; addresses of other forms are Ray's to judge."""
    end_s = time.monotonic() + CONNECT_S
    while not _listens(address):
        if time.monotonic() > end_s:
            raise DeviceError(
                f"no Ray cluster at {address}: nothing answers there; start one, or correct RAY_ADDRESS or "
                "ray_address (without them the job starts a Ray of its own)"
            )
        time.sleep(0.5)


def _listens(address: str) -> bool:
    """Whether a connection can be made to host:port."""
    host, _, port = address.rpartition(":")
    if not host or "://" in address or not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S / 4).close()
    except OSError:
        return False
    return True


class _Lifeline:
    """Notices that the head, or the node that this process has joined, is gone.

    The main thread is interrupted. Should it not come back from Ray, the process ends here: Ray itself
    would end it, some seconds later and without a word for people.
    """

    def __init__(self, address: str, over: threading.Event) -> None:
        import ray

        context = ray.get_runtime_context()
        here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        self._patience_s = {
            context.gcs_address: HEAD_LOST_S,
            f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}": NODE_LOST_S,
        }
        self._over = over
        self.cut = False
        self.error = DeviceError(
            f"the Ray cluster at {address} is lost: its head, or the node of this process, is gone. Bring it "
            "back and start the same command again; finished shards are kept"
        )
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def _watch(self) -> None:
        heard_s = dict.fromkeys(self._patience_s, time.monotonic())
        while not self._over.wait(PING_S):
            for address, patience_s in self._patience_s.items():
                if _listens(address):
                    heard_s[address] = time.monotonic()
                self.cut |= time.monotonic() - heard_s[address] > patience_s
            if self.cut:
                _thread.interrupt_main(signal.SIGTERM)
                if not self._over.wait(NODE_LOST_S):
                    print(f"dit-scale encode: {self.error}", file=sys.stderr, flush=True)
                    os._exit(2)


def is_submitted() -> bool:
    """Whether this is the driver of `ray job submit`, which has shipped the working directory already."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@dataclass(frozen=True)
class Placement:
    """Where the VAE runs, how many actors hold it, how many tasks decode at once."""

    device: str
    encoders: int
    decoders: int


def place_encoders(config: EncodeConfig, nodes: Resources) -> Placement:
    """A placement on these nodes; DeviceError when Ray would wait for room forever."""
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    device = config.device if config.device != "auto" else ("cuda" if gpus else "cpu")
    wants = _wants(config, device)
    room = sum(_places(node, wants) for node in nodes)
    most = max_encoders(config, device, nodes)
    encoders = config.encoders or max(1, most)
    if room < encoders:
        raise DeviceError(
            f"{encoders} encoders that reserve {wants} each do not fit on the Ray cluster of {len(nodes)} "
            f"nodes ({cpus:g} CPUs, {gpus:g} GPUs, room for {room}); lower encoders or cpus_per_encoder, "
            "add nodes, or set nodes=N to wait for all of them"
        )
    left = cpus - encoders * config.cpus_per_encoder
    if most < encoders:
        raise DeviceError(
            f"{encoders} encoders leave {left:g} of {cpus:g} CPUs, a decoder reserves "
            f"{config.cpus_per_decoder:g} of one node; lower encoders, cpus_per_encoder or "
            "cpus_per_decoder, or add nodes"
        )
    places = int(left / config.cpus_per_decoder)
    return Placement(device, encoders, config.decoders or max(1, places - 1))  # one place is the writer's


def max_encoders(config: EncodeConfig, device: str, nodes: Resources) -> int:
    """Encoders that leave room for a decoder on at least one node, wherever Ray puts them."""
    wants = _wants(config, device)
    room = sum(_places(node, wants) for node in nodes)
    filled = 0
    for node in nodes:
        beside = node.get("CPU", 0) - config.cpus_per_decoder
        fill = int(beside / config.cpus_per_encoder) + 1 if beside >= 0 else 0
        if fill > _places(node, wants):
            return room  # a decoder finds room here beside all the encoders that do
        filled += fill
    return max(0, filled - 1)


def _wants(config: EncodeConfig, device: str) -> dict[str, float]:
    """What an encoder reserves."""
    gpus = config.gpus_per_encoder if device == "cuda" else 0
    return {"CPU": config.cpus_per_encoder} | ({"GPU": gpus} if gpus else {})


def _places(node: dict[str, float], wants: dict[str, float]) -> int:
    return int(min(node.get(kind, 0) / amount for kind, amount in wants.items()))


def living_nodes() -> Resources:
    """What Ray believes to be there; it takes a while to notice a death."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def wait_for_nodes(config: EncodeConfig, console: Console) -> Resources:
    """The living nodes, at least `nodes` of them; DeviceError when they do not come within `wait_s`."""
    deadline_s = time.monotonic() + config.wait_s
    told = 0
    while True:
        nodes = living_nodes()
        if len(nodes) >= config.nodes:
            return nodes
        if time.monotonic() > deadline_s:
            raise DeviceError(
                f"{len(nodes)} of nodes={config.nodes} Ray nodes came within {config.wait_s:g} s; see why "
                "the others do not start, or lower nodes"
            )
        if len(nodes) != told:
            console.print(f"{len(nodes)} of {config.nodes} Ray nodes are there, waiting for the others")
            told = len(nodes)
        time.sleep(0.5)


def start_encoders(
    config: EncodeConfig, vae: VaeIdentity, placement: Placement, console: Console, kind: type = Encoder
) -> "tuple[list[ActorHandle], dict[str, str]]":
    """The encoder actors with their VAE loaded, and the runtime that they share."""
    import ray

    actor: Any = ray.remote(kind).options(
        num_cpus=config.cpus_per_encoder,
        num_gpus=config.gpus_per_encoder if placement.device == "cuda" else 0,
        max_restarts=-1,
        max_task_retries=-1,
    )
    encoders = [actor.remote(config, vae, placement.device) for _ in range(placement.encoders)]
    runtimes = [encoder.runtime.remote() for encoder in encoders]
    ready, waiting = ray.wait(runtimes, num_returns=len(runtimes), timeout=PATIENCE_S)
    if waiting:
        console.print(f"waiting for {len(waiting)} encoders: the cluster is busy or the VAE loads slowly")
        ready, waiting = ray.wait(runtimes, num_returns=len(runtimes), timeout=config.wait_s)
    if not ready:
        raise DeviceError(
            f"not one of {len(encoders)} encoders was ready within {config.wait_s:g} s; see `ray status` for "
            "what the cluster lacks, or raise wait_s if the VAE loads slowly"
        )
    if waiting:
        console.print(f"going on without {len(waiting)} encoders; they may still join")
    try:
        found = [get(runtime) for runtime in ready]
    except LostError as error:
        raise DeviceError(f"an encoder could not be started: {error}") from None
    if any(runtime != found[0] for runtime in found):
        raise DeviceError(
            "the encoders run on different devices or libraries, a data set must come from one kind:\n  "
            + "\n  ".join(sorted({str(runtime) for runtime in found}))
        )
    return encoders, found[0]


def get(reference: "ObjectRef") -> Any:
    """ray.get; a person's mistake in a worker is raised as it was there, a loss of Ray's as LostError."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, DitScaleError):
            raise error.cause from None
        if isinstance(error.cause, RayError):
            raise LostError(_first_line(error.cause)) from error
        raise
    except RayError as error:
        raise LostError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
