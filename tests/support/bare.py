"""A Python that has what the project depends on, and not the project: a machine where it is not installed."""

import sysconfig
import venv
from pathlib import Path


def bare_python(folder: Path) -> Path:
    """Make a virtual environment here, and return its interpreter.

    It reads the packages of this one by a plain path, in which Python follows no links of editable installs.
    """
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = folder / "bin/python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python
