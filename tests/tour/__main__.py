"""Run every command of docs/tour.md in a fresh clone of the last commit, as a new user would.

    make tour
    python -m tests.tour --folder /tmp/tour

Sets up a virtual environment of its own: it needs the network, 3 GB of disk and about 15 minutes.
Exits with the code of the first command that fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.documents import ROOT, shell_blocks

OURS = ("PYTHONPATH", "PIP_CONSTRAINT", "VIRTUAL_ENV", "DS_ACCELERATOR")
"""Variables that a new user does not have."""


def main() -> int:
    """Clone, then run the commands in one shell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep the clone here (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dit-scale-tour-") as temporary:
        clone = (args.folder or Path(temporary, "dit-scale")).absolute()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        script = clone / "tour.sh"
        script.write_text("\n".join(["set -euo pipefail", *shell_blocks(clone / "docs" / "tour.md")]))
        # -v shows each command before it runs
        return subprocess.run(["bash", "-v", script.name], cwd=clone, env=new_user()).returncode


def new_user() -> dict[str, str]:
    """Return the environment without what this process has set up for itself."""
    own = str(Path(sys.prefix, "bin"))
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != own]
    rest = {name: value for name, value in os.environ.items() if name not in OURS}
    return {**rest, "PATH": os.pathsep.join(path)}


if __name__ == "__main__":
    sys.exit(main())
