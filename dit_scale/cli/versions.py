"""The versions that a bug report needs, from the metadata of installed packages: nothing is imported."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dit_scale import __version__

PACKAGES = ("torch", "deepspeed", "ray", "diffusers", "numpy", "triton")
CUDA_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")
"""Packages with the CUDA libraries of a torch build, under their names so far."""
DRIVER = Path("/proc/driver/nvidia/version")


def version_report() -> str:
    """Return the version of this program, and below it those of Python, packages, CUDA and the system."""
    packages = [f"{name} {found}" for name in PACKAGES if (found := _version(name))]
    cuda = next(filter(None, map(_version, CUDA_RUNTIMES)), "")
    driver = DRIVER.read_text().splitlines()[0].partition(":")[2].strip() if DRIVER.is_file() else ""
    return "\n".join(
        [
            f"dit-scale {__version__}",
            f"python {platform.python_version()}, {', '.join(packages)}",
            f"{f'CUDA {cuda}' if cuda else 'no CUDA runtime'}, {driver or 'no NVIDIA driver'}",
            f"{platform.platform()}, {platform.machine()}",
        ]
    )


def _version(name: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
