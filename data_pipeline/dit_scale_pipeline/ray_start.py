"""Start Ray on a slow or busy machine.

Ray's own deadlines are short: 15 s for a node's agent to start, 30 s for the node to register with the head.

    python -m dit_scale_pipeline.ray_start --head --block ...

This command takes the options of `ray start`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from dit_scale.errors import DeviceError

NODE_START_S = 300.0
"""Deadline for a new node to register with the head."""
TRIES = 3
PAUSE_S = 0.2


class NotStartedError(DeviceError):
    """Ray's node process exited during startup, or was not ready in time."""


@contextmanager
def patient() -> Iterator[None]:
    """Within the block, give a new node NODE_START_S to register; NotStartedError after that."""
    from ray._private import services

    get_node = services.get_node
    end_s = time.monotonic() + NODE_START_S

    def wait_for_node(*args: Any, **keywords: Any) -> Any:
        while True:
            try:
                return get_node(*args, **keywords)
            except RuntimeError:  # not registered yet; Ray itself polls for only 30 s
                if not is_starting() or time.monotonic() > end_s:
                    raise NotStartedError(
                        "Ray did not start on this machine; see its logs in /tmp/ray/session_latest, or try "
                        "again when the machine is less busy"
                    ) from None
            time.sleep(PAUSE_S)

    services.get_node = wait_for_node
    try:
        yield
    finally:
        services.get_node = get_node


def is_starting() -> bool:
    """Whether a Ray node process (raylet) is a living child of this process."""
    for child in psutil.Process().children():
        try:
            if child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def init(**options: Any) -> None:
    """Start a local Ray with `ray.init(**options)`; try up to TRIES times if its node process dies.

    Other processes of a failed try remain until this process exits. Raises NotStartedError.
    """
    import ray

    for left in reversed(range(TRIES)):
        try:
            with patient():
                ray.init(**options)
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
