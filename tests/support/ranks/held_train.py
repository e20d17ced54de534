"""`dit-scale train` on one process, paced, held at several passes of a point.

python -m tests.support.ranks.held_train CONFIG POINT FOLDER NTH...      (files of the n-th pass: FOLDER/NTH)
"""

import sys
from contextlib import ExitStack
from pathlib import Path

from dit_scale import cli
from tests.support.ranks.jobs import paced
from tests.support.ranks.points import Hold, held

if __name__ == "__main__":
    config, point, folder, *passes = sys.argv[1:]
    with paced(), ExitStack() as stack:
        for nth in passes:
            stack.enter_context(held(Hold(Path(folder, nth), point, int(nth))))
        sys.exit(cli.main(["train", config]))
