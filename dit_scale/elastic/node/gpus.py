"""The GPUs of this node: how many it may use, and whether they are present, free and healthy."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dit_scale.errors import ConfigError
from dit_scale.lines import Say

Query = Callable[[Sequence[str]], str | None]
"""Runs a command and returns its output; None if there is no such command or it failed."""

COMMAND_S = 60.0
"""Longest wait for a command. A GPU that has fallen off the bus can block nvidia-smi."""
FREE_GPU_MIB = 2048
"""A GPU with more memory in use than this belongs to another job."""
XID_AGE_S = 24 * 3600.0
"""Older Xid errors are ignored."""
XIDS = {
    48: "double-bit ECC error",
    62: "internal micro-controller halt",
    64: "row remapping failure",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "GSP timeout",
    120: "GSP error",
    140: "unrecovered ECC error",
}
"""Kernel messages that indicate a broken device and not a broken program: NVIDIA's Xid catalogue."""

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
    """Uncorrected errors since the driver was loaded; 0 if the device does not count them."""


def run_command(command: Sequence[str]) -> str | None:
    """Return the output of a command; None if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=True)
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return done.stdout


def num_devices() -> int:
    """Default number of ranks: one per GPU that this process may use, or 1 on CPUs."""
    return max(1, num_gpus())


def num_gpus() -> int:
    """Number of GPUs that this process may use."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return assigned_gpus(visible)
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall("^GPU ", listed.stdout, re.MULTILINE))


def check_device(device: str) -> None:
    """Raise ConfigError in a SLURM job that has no GPU and does not set engine.device=cpu.

    With `auto` it would silently train on CPUs.
    """
    if device == "cpu" or "SLURM_JOB_ID" not in os.environ or num_gpus():
        return
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    raise ConfigError(
        f"engine.device={device}, but this SLURM job in partition {partition} has no GPU: request GPUs "
        f"(`sbatch --gpus-per-node=1`), choose a partition that has them (`sinfo -o '%P %G'`), or train on "
        "CPUs with engine.device=cpu"
    )


def gpu_problems(device: str, slots: int, say: Say, query: Query) -> list[str]:
    """Return what is wrong with the GPUs that the ranks will use: missing, in use, or unhealthy."""
    if device == "cpu":
        say("skipping the GPU checks: engine.device is cpu")
        return []
    gpus = read_gpus(query((*_GPUS[:2], f"{_GPUS[2]}={_FIELDS}")))
    if not gpus:
        if device == "cuda":
            return [
                "nvidia-smi lists no GPU, but engine.device=cuda needs one; check the driver on this node"
            ]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if assigned_gpus(visible):
            return [
                f"CUDA_VISIBLE_DEVICES={visible} assigns GPUs, but nvidia-smi lists none; check the driver "
                "on this node, or train on CPUs with engine.device=cpu"
            ]
        say("skipping the GPU checks: nvidia-smi lists no GPU, so the ranks will run on the CPU")
        return []
    if len(gpus) < slots:
        return [f"{len(gpus)} GPUs are visible, expected {slots}; reduce --slots or check the missing GPUs"]
    return [
        *_not_assigned(os.environ.get("CUDA_VISIBLE_DEVICES", ""), gpus, slots),
        *(problem for gpu in gpus[:slots] for problem in _gpu_problems(gpu, query)),
        *xid_problems(query(("dmesg",)), time.clock_gettime(time.CLOCK_BOOTTIME), say),
    ]


def read_gpus(text: str | None) -> list[Gpu]:
    """Parse the output of nvidia-smi; devices by index. Lines of another form are ignored."""
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
    """Parse a number; 0 for `[N/A]` and other values of a device that does not report it."""
    return int(text) if text.isdecimal() else 0


def assigned_gpus(visible: str) -> int:
    """Count the GPUs in a value of CUDA_VISIBLE_DEVICES; `-1` and SLURM's `NoDevFiles` are none."""
    names = [name.strip() for name in visible.split(",")]
    return sum(name.isdecimal() or name.startswith(("GPU-", "MIG-")) for name in names)


def _not_assigned(assigned: str, gpus: Sequence[Gpu], slots: int) -> list[str]:
    """Check that devices 0 to slots - 1 are assigned: the launcher gives those to its ranks in any case."""
    if not assigned:
        return []
    names = {str(gpu.index): gpu.index for gpu in gpus} | {gpu.uuid: gpu.index for gpu in gpus}
    usable = {names.get(name.strip()) for name in assigned.split(",")}
    if set(range(slots)) <= usable:
        return []
    return [
        f"CUDA_VISIBLE_DEVICES={assigned}: the ranks would use devices 0 to {slots - 1}, but not all of them "
        "are assigned; let the scheduler hide the other devices, or request exclusive nodes"
    ]


def _gpu_problems(gpu: Gpu, query: Query) -> list[str]:
    problems = []
    if gpu.used_mib > FREE_GPU_MIB:
        command = ("nvidia-smi", "--format=csv,noheader", "--query-compute-apps=gpu_uuid,pid,process_name")
        users = [line for line in (query(command) or "").splitlines() if line.startswith(gpu.uuid)]
        users_text = (
            "; ".join(", ".join(line.split(", ")[1:]) for line in users)
            or "a process that is not visible here"
        )
        problems.append(
            f"GPU {gpu.index} has {gpu.used_mib} MiB in use by {users_text}, expected less than "
            f"{FREE_GPU_MIB}; stop what is running there"
        )
    if gpu.ecc_errors:
        problems.append(
            f"GPU {gpu.index} ({gpu.uuid}) has {gpu.ecc_errors} uncorrected ECC errors, expected none; "
            "reset it, and replace it if they recur"
        )
    return problems


def xid_problems(messages: str | None, uptime_s: float, say: Say) -> list[str]:
    """Return the device errors among the kernel messages of the last day."""
    if messages is None:
        say("skipping the Xid check: this user cannot read the kernel messages")
        return []
    errors = {}
    for at_s, where, number in _XID.findall(messages):
        if int(number) in XIDS and uptime_s - float(at_s) < XID_AGE_S:
            errors[where, int(number)] = uptime_s - float(at_s)
    return [
        f"Xid {number} ({XIDS[number]}) on the GPU at {where}, {age_s / 60:.0f} min ago; reset the device or "
        "reboot the node"
        for (where, number), age_s in errors.items()
    ]
