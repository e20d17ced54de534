"""The Ray cluster of an encoding job: join or start it, wait for its nodes, start the encoders."""

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
"""The code of this process, which workers also run."""

PATIENCE_S = 20.0
"""Time after which the job starts with the encoders that are ready, or reports that it waits for one."""
CONNECT_S = 20.0
"""Time within which the head of a cluster must answer; Ray itself tries for 15 minutes."""
PING_S = 2.0
"""Interval of the checks whether the head is alive."""
HEAD_LOST_S = 40.0
"""Time without the head after which the job exits; after 60 s Ray would end the process."""
NODE_LOST_S = 6.0
"""Time without the local node after which the job exits; a process cannot join a second node."""
MAX_MESSAGE = 200
"""Characters shown of a message of the cluster."""

Resources = Sequence[dict[str, float]]
"""Resources of each living node: CPU, GPU, ..."""


class LostError(Exception):
    """Ray gave up a task or lost its result."""


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """Join a Ray cluster, or start a local one that stops at the end of the block.

    Raises DeviceError when the cluster cannot be joined or is lost, and KeyboardInterrupt after a signal.
    """
    import ray
    from ray._private import worker
    from ray.exceptions import RayError, RayTaskError

    # Ray prints messages of the cluster, such as the last lines of a dead node's log, on standard output.
    worker.print_to_stdstream = _show_message  # type: ignore[assignment]
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise Ray warns at every start
    address = os.environ.get("RAY_ADDRESS", "local") if address == "auto" else address
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        roots = [str(package.parent) for package in PACKAGES]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*roots, os.environ.get("PYTHONPATH")]))
        options["include_dashboard"] = False
    else:
        # The flow reports lost work in a line; Ray would log pages.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        _wait_for_head(address)
        options["runtime_env"] = {"py_modules": [str(package) for package in PACKAGES]}
    with ExitStack() as stack:
        over = threading.Event()
        stack.callback(ray.shutdown)
        stack.callback(over.set)  # runs first: the node stops during the shutdown and must not count as lost
        try:
            with _late_interrupts():
                (ray_start.init if address == "local" else ray.init)(**options)
        except (ConnectionError, ValueError) as error:
            raise DeviceError(f"no Ray cluster at {address}: {error}") from None
        lifeline = _Lifeline(address, over)
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if signals.was_interrupted():  # the signal may have ended Ray before it arrived here
                raise KeyboardInterrupt from error
            if isinstance(error, RayTaskError):
                raise  # an error of the code that ran there
            if isinstance(error, RayError | OSError | KeyboardInterrupt):
                raise lifeline.error from error
            raise


def _show_message(message: dict[str, Any], ignore_prefix: bool) -> None:
    """Show the first line of a message from the cluster. Replaces a function of Ray, with its signature."""
    text = " ".join(message["lines"]).strip().partition("\n")[0]
    print(f"Ray: {text[:MAX_MESSAGE]}", file=sys.stderr, flush=True)


@contextmanager
def _late_interrupts() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and similar signals until the end of the block, then raise KeyboardInterrupt.

    Ray would install its own handler, which leaves processes of a half-started Ray running.
    """
    received: list[int] = []
    for number in signals.caught():
        signal.signal(number, lambda number, _: received.append(number))
    set_handler = signal.signal
    signal.signal = lambda number, handler: signal.getsignal(number)  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_handler
        signals.interrupt()
    if received:
        raise KeyboardInterrupt


def _wait_for_head(address: str) -> None:
    """DeviceError when nothing listens at host:port; Ray checks addresses of other forms."""
    end_s = time.monotonic() + CONNECT_S
    while not _listens(address):
        if time.monotonic() > end_s:
            raise DeviceError(
                f"no Ray cluster at {address}: no answer; start one, or correct RAY_ADDRESS or ray_address "
                "(without them the job starts a local Ray)"
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
    """Detects the loss of the head or of the node that this process has joined.

    It interrupts the main thread. If the main thread does not return from Ray, it ends the process with an
    error message, because Ray would end it some seconds later without one.
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
        self.error = DeviceError(
            f"lost the Ray cluster at {address}: its head or the node of this process no longer answers. "
            "Restart it and run the same command again; finished shards are kept"
        )
        # A signal that nobody else sends here.
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def _watch(self) -> None:
        answered_s = dict.fromkeys(self._patience_s, time.monotonic())
        while not self._over.wait(PING_S):
            is_lost = False
            for address, patience_s in self._patience_s.items():
                if _listens(address):
                    answered_s[address] = time.monotonic()
                is_lost |= time.monotonic() - answered_s[address] > patience_s
            if is_lost:
                _thread.interrupt_main(signal.SIGALRM)
                if not self._over.wait(NODE_LOST_S):
                    self._end_process()

    def _end_process(self) -> None:
        interrupted = signals.was_interrupted()
        text = "interrupted; run the same command again to continue" if interrupted else self.error
        print(f"dit-scale encode: {text}", file=sys.stderr, flush=True)
        os._exit(130 if interrupted else 2)


def is_submitted() -> bool:
    """Whether this is the driver of `ray job submit`, which runs in a copy of the working directory."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@dataclass(frozen=True)
class Placement:
    """The device of the VAE, the number of encoder actors and the number of parallel decoding tasks."""

    device: str
    encoders: int
    decoders: int


def place_encoders(config: EncodeConfig, nodes: Resources) -> Placement:
    """Plan the placement on these nodes; DeviceError when Ray would wait for room forever."""
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    device = config.device if config.device != "auto" else ("cuda" if gpus else "cpu")
    request = _resources_of_encoder(config, device)
    room = sum(_capacity(node, request) for node in nodes)
    most = max_encoders(config, device, nodes)
    encoders = config.encoders or max(1, most)
    if room < encoders:
        raise DeviceError(
            f"{encoders} encoders that reserve {request} each do not fit on the Ray cluster of {len(nodes)} "
            f"nodes ({cpus:g} CPUs, {gpus:g} GPUs, room for {room}); lower encoders or cpus_per_encoder, "
            "add nodes, or set nodes=N to wait for all of them"
        )
    left = cpus - encoders * config.cpus_per_encoder
    if most < encoders:
        raise DeviceError(
            f"{encoders} encoders leave {left:g} of {cpus:g} CPUs, but a decoder reserves "
            f"{config.cpus_per_decoder:g} of one node; lower encoders, cpus_per_encoder or "
            "cpus_per_decoder, or add nodes"
        )
    slots = int(left / config.cpus_per_decoder)
    return Placement(device, encoders, config.decoders or max(1, slots - 1))  # one slot is for writing


def max_encoders(config: EncodeConfig, device: str, nodes: Resources) -> int:
    """Return how many encoders leave room for a decoder on at least one node, wherever Ray places them."""
    request = _resources_of_encoder(config, device)
    room = sum(_capacity(node, request) for node in nodes)
    filled = 0
    for node in nodes:
        left = node.get("CPU", 0) - config.cpus_per_decoder
        fill = int(left / config.cpus_per_encoder) + 1 if left >= 0 else 0
        if fill > _capacity(node, request):
            return room  # a decoder fits here next to all encoders that fit
        filled += fill
    return max(0, filled - 1)


def _resources_of_encoder(config: EncodeConfig, device: str) -> dict[str, float]:
    """Return the resources that an encoder reserves."""
    gpus = config.gpus_per_encoder if device == "cuda" else 0
    return {"CPU": config.cpus_per_encoder} | ({"GPU": gpus} if gpus else {})


def _capacity(node: dict[str, float], request: dict[str, float]) -> int:
    return int(min(node.get(kind, 0) / amount for kind, amount in request.items()))


def living_nodes() -> Resources:
    """Return the nodes that Ray considers alive; it detects a dead node with a delay."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def wait_for_nodes(config: EncodeConfig, console: Console) -> Resources:
    """Wait until `nodes` nodes are alive and return them; DeviceError after `wait_s`."""
    deadline_s = time.monotonic() + config.wait_s
    reported = 0
    while True:
        nodes = living_nodes()
        if len(nodes) >= config.nodes:
            return nodes
        if time.monotonic() > deadline_s:
            raise DeviceError(
                f"{len(nodes)} of nodes={config.nodes} Ray nodes joined within {config.wait_s:g} s; check "
                "why the others did not start, or lower nodes"
            )
        if len(nodes) != reported:
            console.print(f"{len(nodes)} of {config.nodes} Ray nodes have joined, waiting for the others")
            reported = len(nodes)
        time.sleep(0.5)


def start_encoders(
    config: EncodeConfig, vae: VaeIdentity, placement: Placement, console: Console, kind: type = Encoder
) -> "tuple[list[ActorHandle], dict[str, str]]":
    """Start the encoder actors; return them and their common runtime.

    One ready encoder is enough: others may be waiting for room that another job still occupies.
    """
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
    if not ready:
        console.print("waiting for an encoder: the cluster is busy, or the VAE loads slowly")
        ready, waiting = ray.wait(runtimes, num_returns=1, timeout=config.wait_s)
    if not ready:
        raise DeviceError(
            f"none of {len(encoders)} encoders was ready within {config.wait_s:g} s; run `ray status` to see "
            "what the cluster lacks, or raise wait_s if the VAE loads slowly"
        )
    if waiting:
        console.print(f"starting with {len(ready)} of {len(encoders)} encoders; the others may join later")
    try:
        loaded = [get(runtime) for runtime in ready]
    except LostError as error:
        raise DeviceError(f"an encoder could not be started: {error}") from None
    if any(runtime != loaded[0] for runtime in loaded):
        raise DeviceError(
            "the encoders run on different devices or library versions; all must be the same:\n  "
            + "\n  ".join(sorted({str(runtime) for runtime in loaded}))
        )
    return encoders, loaded[0]


def get(reference: "ObjectRef") -> Any:
    """Like ray.get, but raise a worker's DitScaleError itself and work lost by Ray as LostError."""
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
