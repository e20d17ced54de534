"""`dit-scale sample`, which holds at a point of its work, so that a test can kill it there.

    python -m tests.support.held_sample POINT FILE -- RUN --images 20 ...

At the point it creates FILE and sleeps.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dit_scale.cli import main
from dit_scale.sampling import assembly, sample_folder

POINTS: dict[str, tuple[Any, str]] = {
    "part half written": (sample_folder, "write_npz"),
    "npz half written": (assembly, "write_npz"),
    "npz written": (assembly, "check_npz"),
    "npz checked": (assembly, "write_grid"),
    "grid written": (assembly, "sealed"),
    "mark written": (sample_folder.SampleFolder, "discard_parts"),
}
"""Point => the object and the name of the function whose call it is."""


def held(file: Path, point: str) -> Callable[..., None]:
    """Return a function that creates the file and sleeps."""

    def hold(*args: Any, **named: Any) -> None:
        if "half" in point:
            target = Path(args[2])
            target.parent.mkdir(parents=True, exist_ok=True)
            (target.parent / f".{target.name}.0123456789abcdef.tmp").write_bytes(b"PK\3\4 half a file")
        file.touch()
        while True:
            time.sleep(1)

    return hold


if __name__ == "__main__":
    name, mark = sys.argv[1], Path(sys.argv[2])
    owner, function = POINTS[name]
    with patch.object(owner, function, held(mark, name)):
        sys.exit(main(["sample", *sys.argv[4:]]))
