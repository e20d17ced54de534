"""A Python with the project's dependencies but without the project itself."""

import sysconfig
import venv
from pathlib import Path


def bare_python(folder: Path) -> Path:
    """Make a virtual environment in this folder, and return its interpreter.

    It reads the packages of the current environment through a plain path, where Python ignores the links of
    editable installs.
    """
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = folder / "bin/python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python
