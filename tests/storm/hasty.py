"""A process with short request timeouts, quick retries, and multipart uploads of rank files.

This makes the tests faster and gives the proxy more requests to break.

python -m tests.storm.hasty MODULE <its arguments>
"""

import runpy
import sys
from collections.abc import Callable

from dit_scale.storage import s3, transfer
from tests.support.speed import scaled

KNOBS = (
    # Not less: on a busy machine an answer may take this long.
    (transfer, "STALL_S", scaled(2.0)),
    (s3, "DEADLINE_S", scaled(s3.DEADLINE_S)),
    (s3, "FIRST_PAUSE_S", 0.01),
    (s3, "LONGEST_PAUSE_S", 0.2),
    (s3, "PART_BYTES", s3.MIN_PART_BYTES),
)


def hurry(set_knob: Callable[[object, str, float], None] = setattr) -> None:
    """Apply the short timeouts in this process."""
    for module, name, value in KNOBS:
        set_knob(module, name, value)


if __name__ == "__main__":
    hurry()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
