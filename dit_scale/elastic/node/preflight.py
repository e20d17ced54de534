"""What must be right on a node before it takes part in a round: a bad one should say so and stay out.

GPUs as `nvidia-smi` has them, room on disks, the data set, the run's folder, the clock, a sum over the GPUs.
Each check returns problems: what was got, what was expected, what to do. What is merely odd, or cannot be
seen, is said.
"""

import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dit_scale.config import TrainConfig
from dit_scale.data.shards import read_info
from dit_scale.elastic.node.collective import collective_problems
from dit_scale.errors import DitScaleError
from dit_scale.lines import Say
from dit_scale.models.zoo import num_parameters, shape_of
from dit_scale.storage import Storage, open_storage

Query = Callable[[Sequence[str]], str | None]
"""Runs a command; its output, None when there is no such command or it failed."""

COMMAND_S = 60.0
"""Longest wait for a command: a GPU that has fallen off the bus can hold nvidia-smi up."""
FREE_GPU_MIB = 2048
"""A GPU with more memory in use belongs to somebody."""
SPARE_BYTES = 2**30
"""Room for what is small: metrics, journals, temporary files, the begin of a cache."""
CLOCK_S = 5.0
"""Between the clock of this node and that of the run's folder; more is said."""
LOCAL_FILE_SYSTEMS = ("btrfs", "ext2/ext3", "overlayfs", "tmpfs", "xfs", "zfs")
"""As `stat -f` names them."""
XID_AGE_S = 24 * 3600.0
XIDS = {
    48: "double-bit ECC error",
    62: "internal micro-controller halt",
    64: "a row could not be remapped",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "the GSP does not answer",
    120: "GSP error",
    140: "unrecovered ECC error",
}
"""Kernel messages that mean a broken device, not a broken program: NVIDIA's Xid catalogue."""

_GPUS = ("nvidia-smi", "--format=csv,noheader,nounits", "--query-gpu")
_FIELDS = "index,uuid,memory.used,ecc.errors.uncorrected.volatile.total"
_XID = re.compile(r"\[\s*(\d+\.\d+)\].*NVRM: Xid \(([^)]*)\): (\d+)")


@dataclass(frozen=True)
class Gpu:
    """A device of this node."""

    index: int
    uuid: str
    used_mib: int
    ecc_errors: int
    """Uncorrected, since the driver was loaded; 0 where the device does not count them."""


class Preflight:
    """The checks of a node: all of them at first, and those that take no time before every further round."""

    def __init__(self, config: TrainConfig, slots: int, say: Say) -> None:
        self._config, self._slots, self._say = config, slots, say
        self._is_first = True

    def __call__(self) -> list[str]:
        """What keeps the node from taking part."""
        if not self._is_first:
            return preflight(self._config, self._slots, lambda text: None)
        self._is_first = False
        problems = preflight(self._config, self._slots, self._say)
        return problems or collective_problems(self._config.engine.device, self._slots)


def preflight(config: TrainConfig, slots: int, say: Say = print, query: Query | None = None) -> list[str]:
    """The problems of this node, which is to run `slots` ranks; none when it may take part.

    `say` gets what is odd and no reason to stay out, and what was left out of the checks.
    """
    query = query or run_command
    return [
        *gpu_problems(config.engine.device, slots, say, query),
        *space_problems(config),
        *data_problems(config),
        *folder_problems(config, say),
    ]


def run_command(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=True)
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return done.stdout


# GPUs


def gpu_problems(device: str, slots: int, say: Say, query: Query) -> list[str]:
    """Whether the GPUs that the ranks will use are there, theirs alone, and sound."""
    if device == "cpu":
        say("GPUs are not looked at: engine.device is cpu")
        return []
    gpus = read_gpus(query((*_GPUS[:2], f"{_GPUS[2]}={_FIELDS}")))
    if not gpus:
        if device == "cuda":
            return [
                "nvidia-smi shows no GPU, engine.device=cuda needs one; see whether it works on this node"
            ]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if assigned_gpus(visible):
            return [
                f"CUDA_VISIBLE_DEVICES={visible} assigns GPUs and nvidia-smi shows none; see whether it "
                "works on this node, or train on CPUs with engine.device=cpu"
            ]
        say("GPUs are not looked at: nvidia-smi shows none, so the ranks will run on the CPU")
        return []
    if len(gpus) < slots:
        return [f"{len(gpus)} GPUs are visible, expected {slots}; give fewer --slots, or look for the others"]
    return [
        *_not_assigned(os.environ.get("CUDA_VISIBLE_DEVICES", ""), gpus, slots),
        *(problem for gpu in gpus[:slots] for problem in _gpu_problems(gpu, query)),
        *xid_problems(query(("dmesg",)), time.clock_gettime(time.CLOCK_BOOTTIME), say),
    ]


def read_gpus(text: str | None) -> list[Gpu]:
    """The devices in nvidia-smi's answer, by index; lines of another form are none."""
    rows = [[cell.strip() for cell in line.split(",")] for line in (text or "").splitlines()]
    return sorted(
        (
            Gpu(int(row[0]), row[1], _number(row[2]), _number(row[3]))
            for row in rows
            if len(row) == 4 and row[0].isdecimal()
        ),
        key=lambda gpu: gpu.index,
    )


def _number(text: str) -> int:
    """0 for what a device does not tell, `[N/A]` and the like."""
    return int(text) if text.isdecimal() else 0


def assigned_gpus(visible: str) -> int:
    """GPUs in a value of CUDA_VISIBLE_DEVICES, where `-1` and words such as SLURM's `NoDevFiles` are none."""
    names = [name.strip() for name in visible.split(",")]
    return sum(name.isdecimal() or name.startswith(("GPU-", "MIG-")) for name in names)


def _not_assigned(assigned: str, gpus: Sequence[Gpu], slots: int) -> list[str]:
    """The launcher gives the ranks of a node devices 0 to slots - 1, whatever it was given itself."""
    if not assigned:
        return []
    names = {str(gpu.index): gpu.index for gpu in gpus} | {gpu.uuid: gpu.index for gpu in gpus}
    given = {names.get(name.strip()) for name in assigned.split(",")}
    if set(range(slots)) <= given:
        return []
    return [
        f"CUDA_VISIBLE_DEVICES={assigned}: the ranks would use devices 0 to {slots - 1}, which are not all "
        "assigned; have the scheduler hide the other devices, or take whole nodes"
    ]


def _gpu_problems(gpu: Gpu, query: Query) -> list[str]:
    problems = []
    if gpu.used_mib > FREE_GPU_MIB:
        command = ("nvidia-smi", "--format=csv,noheader", "--query-compute-apps=gpu_uuid,pid,process_name")
        users = [line for line in (query(command) or "").splitlines() if line.startswith(gpu.uuid)]
        who = "; ".join(", ".join(line.split(", ")[1:]) for line in users) or "nobody that is seen from here"
        problems.append(
            f"GPU {gpu.index} has {gpu.used_mib} MiB in use by {who}, expected less than {FREE_GPU_MIB}; "
            "end what runs there"
        )
    if gpu.ecc_errors:
        problems.append(
            f"GPU {gpu.index} ({gpu.uuid}) counts {gpu.ecc_errors} uncorrected ECC errors, expected none; "
            "reset it, and have it replaced when they come back"
        )
    return problems


def xid_problems(messages: str | None, uptime_s: float, say: Say) -> list[str]:
    """Errors of devices in the kernel's messages of the last day."""
    if messages is None:
        say("Xid errors are not looked at: this user cannot read the kernel's messages")
        return []
    found = {}
    for at_s, where, number in _XID.findall(messages):
        if int(number) in XIDS and uptime_s - float(at_s) < XID_AGE_S:
            found[where, int(number)] = uptime_s - float(at_s)
    return [
        f"Xid {number} ({XIDS[number]}) of the GPU at {where}, {age_s / 60:.0f} min ago; reset the device or "
        "start the node again"
        for (where, number), age_s in found.items()
    ]


# Disks, data, the run's folder


def space_problems(config: TrainConfig) -> list[str]:
    """Whether a checkpoint, and the small things, have room."""
    kinds = 3 + len(config.ema)  # masters, two moments, averages, all fp32
    checkpoint_bytes = 4 * kinds * num_parameters(shape_of(config.model))
    needs = {
        Path(tempfile.gettempdir()): ("TMPDIR", SPARE_BYTES),
        Path(config.run): ("run", SPARE_BYTES),
    }
    root = open_storage(config.checkpoint.url or config.run).local_path("checkpoints")
    if root:
        name = "checkpoint.url" if config.checkpoint.url else "run"
        needs[root.parent] = (name, SPARE_BYTES + checkpoint_bytes)
    if open_storage(config.data.url).local_path("dataset.json") is None:
        needs[Path(config.data.cache_dir)] = ("data.cache_dir", SPARE_BYTES)
    problems = []
    for folder, (name, need_bytes) in needs.items():
        free_bytes = shutil.disk_usage(_existing(folder)).free
        if free_bytes < need_bytes:
            problems.append(
                f"{folder} has {free_bytes / 1e9:.2f} GB of room, expected at least {need_bytes / 1e9:.2f}; "
                f"delete something there or choose another place ({name})"
            )
    return problems


def _existing(folder: Path) -> Path:
    """The folder, or the one above it that is there already."""
    while not folder.exists():
        folder = folder.parent
    return folder


def data_problems(config: TrainConfig) -> list[str]:
    """Whether the data set can be seen from here; its shards are checked as they are read."""
    try:
        read_info(open_storage(config.data.url))
    except DitScaleError as error:
        return [f"the data set cannot be read: {error}"]
    return []


def say_unless_shared(root: Storage, most_nodes: int, say: Say, query: Query | None = None) -> None:
    """Say so when several nodes are to find each other in a folder that seems to be this node's alone.

    It may be one that this node exports, so it is no problem. But where it is, each node trains by itself.
    """
    folder = root.local_path("elastic")
    if most_nodes == 1 or folder is None:
        return
    kind = ((query or run_command)(("stat", "-f", "-c", "%T", str(_existing(folder)))) or "").strip()
    if kind in LOCAL_FILE_SYSTEMS:
        say(
            f"{root.url} is on a disk of this node ({kind}), and up to {most_nodes} nodes are to find each "
            "other there: all must see the same folder, or each would train alone"
        )


def folder_problems(config: TrainConfig, say: Say) -> list[str]:
    """Whether the run's folder, and the root of its checkpoints, can be written; the clock beside theirs."""
    root = open_storage(config.checkpoint.url or config.run)
    key = f"elastic/preflight/{secrets.token_hex(8)}"
    try:
        root.write(key, b"1")
        root.delete(key)
    except DitScaleError as error:
        return [f"the root of the checkpoints cannot be written: {error}"]
    probe = Path(config.run) / f".preflight-{secrets.token_hex(8)}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        offset_s = time.time() - probe.stat().st_mtime
    except OSError as error:
        return [f"run={config.run} cannot be written: {error}; it must be the same folder for all nodes"]
    finally:
        with suppress(OSError):
            probe.unlink()
    if abs(offset_s) > CLOCK_S:
        say(
            f"the clock of this node is {offset_s:+.0f} s off that of {config.run}: times in the journals "
            "will not fit together; see whether it is synchronised"
        )
    return []
