"""Ray on a machine that is slow: Ray itself gives its node 15 s for this and 30 s for that as it starts.

    python -m dit_scale_pipeline.ray_start --head --block ...

takes the options of `ray start`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from dit_scale.errors import DeviceError

NODE_START_S = 300.0
"""Time in which a node that was started here must register with the head."""
TRIES = 3
PAUSE_S = 0.2


class NotStartedError(DeviceError):
    """Ray's node process ended as it started, or did not get ready in time."""


@contextmanager
def patient() -> Iterator[None]:
    """Within the block, the start of a node has NODE_START_S. NotStartedError when it failed all the same."""
    from ray._private import services

    get_node = services.get_node
    end_s = time.monotonic() + NODE_START_S

    def wait_for_node(*args: Any, **keywords: Any) -> Any:
        while True:
            try:
                return get_node(*args, **keywords)
            except RuntimeError:  # not there yet; Ray asks again, too, but for 30 s
                if not is_starting() or time.monotonic() > end_s:
                    raise NotStartedError(
                        f"Ray did not start on this machine ({TRIES} tries of {NODE_START_S:g} s at most); "
                        "see its logs in /tmp/ray/session_latest, or start again when there is less to do"
                    ) from None
            time.sleep(PAUSE_S)

    services.get_node = wait_for_node
    try:
        yield
    finally:
        services.get_node = get_node


def is_starting() -> bool:
    """Whether a node process of Ray is alive that this process has started."""
    for child in psutil.Process().children():
        try:
            if child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def init(**how: Any) -> None:
    """`ray.init` of a local Ray. A node that ended as it started is started anew.

    It waits 15 s for a program of its own and ends without it; what is left of it ends with this process.
    """
    import ray

    for left in reversed(range(TRIES)):
        try:
            with patient():
                ray.init(**how)
            return
        except NotStartedError:
            if not left:
                raise


def main() -> None:
    from ray.scripts.scripts import main as ray

    sys.argv = ["ray", "start", *sys.argv[1:]]
    with patient():
        ray()


if __name__ == "__main__":
    main()
