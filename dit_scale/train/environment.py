"""What a run runs on, for its journal: versions of programs, and the devices of all ranks."""

import platform
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dit_scale import __version__
from dit_scale.dist import World

CPU_INFO = Path("/proc/cpuinfo")


def environment(world: World) -> dict[str, Any]:
    """Return versions by program, and the number of ranks by name of their device. All ranks call this."""
    versions = {
        "dit_scale": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {"versions": versions, "devices": dict(Counter(world.gather(device_name(world.device))))}


def device_name(device: torch.device) -> str:
    """Return the product name of a device, such as NVIDIA H200; the architecture for an unknown CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPU_INFO.read_text(errors="replace") if CPU_INFO.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", lines, re.MULTILINE)
    return found[1] if found else platform.machine()
