"""The supervisor of this node, for real: storage, processes, the monotonic clock, the scheduler's signals."""

import hashlib
import os
import re
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import numpy as np

from dit_scale import signals
from dit_scale.checkpoint import attempts
from dit_scale.config import TrainConfig, dump
from dit_scale.data.order import Order, positions_of
from dit_scale.data.shards import read_info
from dit_scale.elastic.board import Board, Member
from dit_scale.elastic.node.address import check_address, free_port
from dit_scale.elastic.node.deadlines import LEAVE_S, Deadlines
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.node.group import LaunchedGroup
from dit_scale.elastic.node.preflight import Preflight, assigned_gpus, say_unless_shared
from dit_scale.elastic.supervisor import Dependencies, Policy, Supervisor, Wait
from dit_scale.errors import ConfigError, DitScaleError, StorageError
from dit_scale.journal import Event, Journal
from dit_scale.paths import without_paths
from dit_scale.storage import Storage, open_storage

MODULE = "dit_scale.cli"


class WantedBack:
    """Up once the scheduler, or a person by Ctrl-C or by closing the terminal, wants the node back."""

    def __init__(self) -> None:
        self.is_up = False
        for number in signals.caught():
            signal.signal(number, self._raise_it)

    def _raise_it(self, number: int, frame: FrameType | None) -> None:
        self.is_up = True


def launch(
    config: TrainConfig,
    arguments: Sequence[str],
    policy: Policy,
    node: str,
    address: str,
    slots: int,
    start: int = 0,
) -> Exit:
    """Supervise this node's ranks of a run; `arguments` are those of `dit-scale train`."""
    check_address(address)
    check_device(config.engine.device)
    root = open_storage(config.checkpoint.url or config.run)
    folder = Path(config.run) / "supervisors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"run={config.run} cannot be made: {error.strerror}; it must be the same folder for all nodes"
        ) from None
    wanted_back = WantedBack()

    def say(message: str) -> None:
        print(f"[{node}] {message}", flush=True)

    journal = Journal(folder / f"{node}.jsonl", lambda text: say(f"ALARM: {text}"))

    def record(event: Event, **details: object) -> None:
        journal.write(event, node=node, **details)

    say_unless_shared(root, policy.max_nodes, say)
    me = Member(node, secrets.token_hex(8), address, free_port(), slots, digest(config), start)
    world = Dependencies(
        time.monotonic,
        lambda: committed_step(root),
        lambda: wanted_back.is_up,
        say,
        record,
        free_port,
        lambda step: samples_of(config, root, step),
        Preflight(config, slots, say),
    )
    deadlines = Deadlines(data_s=config.data.deadline_s + LEAVE_S)
    command = ["--module", MODULE, "train", *arguments]
    with tempfile.TemporaryDirectory(prefix="dit-scale-") as beats:
        group = LaunchedGroup(command, Path(beats), deadlines, record, folder / "stacks", say)
        try:
            return drive(Supervisor(me, Board(root), group, policy, world).run())
        except StorageError as error:
            record(Event.BOARD_GONE, problem=str(error))
            raise StorageError(
                f"the supervisors cannot agree any more, and the ranks of {node} are ended: {error}; when it "
                "is mended the same command goes on"
            ) from error
        finally:
            if problem := journal.close():
                say(f"ALARM: {problem}")


def drive(life: Wait) -> Exit:
    """Run a supervisor in real time; whatever ends it, its ranks are ended."""
    try:
        while True:
            until_s = next(life)
            time.sleep(max(0.0, until_s - time.monotonic()))
    except StopIteration as end:
        code: Exit = end.value
        return code
    finally:
        life.close()


def committed_step(root: Storage) -> int:
    """The step of the newest checkpoint whose manifest can be read; -1 when there is none."""
    committed = attempts.committed(root)
    return next((newest.step for newest in committed if attempts.is_readable(root, newest)), -1)


def samples_of(config: TrainConfig, root: Storage, step: int) -> list[int]:
    """The ids of the samples of the step after so many steps, damaged ones not yet replaced."""
    try:
        info = read_info(open_storage(config.data.url))
        attempt = attempts.newest(root)
    except DitScaleError:
        return []  # what cannot be read may be why the run failed; the report says that
    sizes = [shard.samples for shard in info.shards]
    indices = np.arange(step * config.global_batch, (step + 1) * config.global_batch, dtype=np.int64)
    positions = positions_of(indices, attempt.excluded_positions if attempt else ())
    order = Order(info.samples, config.seed, sizes, config.data.window_shards)
    ids: list[int] = order.ids(positions).tolist()
    return ids


def digest(config: TrainConfig) -> str:
    """SHA-256 of the resolved configuration without its paths, whose names may differ between nodes.

    The nodes that meet have the same root, and their ranks compare the data sets that they see.
    """
    return hashlib.sha256(dump(without_paths(config)).encode()).hexdigest()


def num_devices() -> int:
    """GPUs that this process was given; 1, for a CPU rank, when there are none."""
    return max(1, num_gpus())


def num_gpus() -> int:
    """GPUs that this process was given."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return assigned_gpus(visible)
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall("^GPU ", listed.stdout, re.MULTILINE))


def check_device(device: str) -> None:
    """Raises ConfigError in a SLURM job without GPUs that does not ask for the CPU; `auto` would take it."""
    if device == "cpu" or "SLURM_JOB_ID" not in os.environ or num_gpus():
        return
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    raise ConfigError(
        f"engine.device={device}, and this SLURM job in partition {partition} has no GPU: ask for some, "
        f"`sbatch --gpus-per-node=1`, or another partition (`sinfo -o '%P %G'` shows who has them), "
        "or train on CPUs with engine.device=cpu"
    )


def node_range(text: str) -> tuple[int, int]:
    """`4` or `2:4` as the least and the largest number of nodes."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise ConfigError(f"--nodes {text}: expected a number of nodes, or least:most, for example 2:4")
    return int(least), int(most or least)
