"""The Ray cluster of an encoding job: joined or started, waited for, and filled with encoders."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from data_pipeline.encoder import Encoder
from data_pipeline.flow import LostError, get
from dit_scale.config import EncodeConfig
from dit_scale.data.shards import VaeIdentity
from dit_scale.errors import DeviceError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

ROOT = Path(__file__).resolve().parents[1]

PATIENCE_S = 20.0
"""Time after which a job that waits for its encoders says so."""

Resources = Sequence[dict[str, float]]
"""What each living node has: CPU, GPU, ..."""


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """Join a Ray cluster or start a local one; what was started here is ended here."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns at every start
    address = os.environ.get("RAY_ADDRESS", "local") if address == "auto" else address
    how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        how["include_dashboard"] = False
    elif not is_submitted():
        how["runtime_env"] = {"py_modules": [str(ROOT / "dit_scale"), str(ROOT / "data_pipeline")]}
    try:
        try:
            ray.init(**how)
        except (ConnectionError, ValueError) as error:
            raise DeviceError(f"no Ray cluster at {address}: {error}") from None
        # A scheduler's SIGTERM is an interrupt too; Ray's own handler prints a stack and leaves with 15.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    finally:
        ray.shutdown()


def is_submitted() -> bool:
    """Whether this is the driver of `ray job submit`, which has shipped the working directory already."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@dataclass(frozen=True)
class Placement:
    """Where the VAE runs, how many actors hold it, how many tasks decode at once."""

    device: str
    encoders: int
    decoders: int


def place(config: EncodeConfig, nodes: Resources) -> Placement:
    """A placement on these nodes; DeviceError when Ray would wait for room forever."""
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    device = config.device if config.device != "auto" else ("cuda" if gpus else "cpu")
    wants = {"CPU": config.cpus_per_encoder, "GPU": config.gpus_per_encoder if device == "cuda" else 0}
    wants = {kind: amount for kind, amount in wants.items() if amount}
    room = sum(int(min(node.get(kind, 0) / amount for kind, amount in wants.items())) for node in nodes)
    beside_a_decoder = int((cpus - config.cpus_per_decoder) / config.cpus_per_encoder)
    encoders = config.encoders or max(1, min(room, beside_a_decoder))
    if room < encoders:
        raise DeviceError(
            f"{encoders} encoders that reserve {wants} each do not fit on the Ray cluster of {len(nodes)} "
            f"nodes ({cpus:g} CPUs, {gpus:g} GPUs, room for {room}); lower encoders or cpus_per_encoder, "
            "add nodes, or set nodes=N to wait for all of them"
        )
    left = cpus - encoders * config.cpus_per_encoder
    if left < config.cpus_per_decoder:
        raise DeviceError(
            f"{encoders} encoders leave {left:g} of {cpus:g} CPUs, a decoder reserves "
            f"{config.cpus_per_decoder:g}; lower encoders, cpus_per_encoder or cpus_per_decoder, or add nodes"
        )
    places = int(left / config.cpus_per_decoder)
    return Placement(device, encoders, config.decoders or max(1, places - 1))  # one place is the writer's


def wait_for_nodes(config: EncodeConfig, console: Console) -> Resources:
    """The living nodes, at least `nodes` of them; DeviceError when they do not come within `wait_s`."""
    import ray

    deadline_s = time.monotonic() + config.wait_s
    told = 0
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
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
    _, waiting = ray.wait(runtimes, num_returns=len(runtimes), timeout=PATIENCE_S)
    if waiting:
        console.print(f"waiting for {len(waiting)} encoders: the cluster is busy or the VAE loads slowly")
    try:
        found = [get(runtime) for runtime in runtimes]
    except LostError as error:
        raise DeviceError(f"an encoder could not be started: {error}") from None
    if any(runtime != found[0] for runtime in found):
        raise DeviceError(
            "the encoders run on different devices or libraries, a data set must come from one kind:\n  "
            + "\n  ".join(sorted({str(runtime) for runtime in found}))
        )
    return encoders, found[0]
