"""`ray start`, also on a machine that is slow: Ray gives up a node that is not there after 30 s.

    python -m dit_scale_pipeline.ray_start --head --block ...

takes the options of `ray start`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dit_scale.errors import DeviceError

NODE_START_S = 300.0
"""Time in which a node that was started here must register with the head."""
PAUSE_S = 0.2


@contextmanager
def patient() -> Iterator[None]:
    """Within the block, the start of a node has NODE_START_S. DeviceError when that was not enough."""
    from ray._private import services

    get_node = services.get_node
    end_s = time.monotonic() + NODE_START_S

    def wait_for_node(*args: Any, **keywords: Any) -> Any:
        while True:
            try:
                return get_node(*args, **keywords)
            except RuntimeError:  # not there yet; Ray asks again, too, but for 30 s
                if time.monotonic() > end_s:
                    raise DeviceError(
                        f"Ray did not start within {NODE_START_S:g} s; see its logs, or start again when "
                        "this machine has less to do"
                    ) from None
            time.sleep(PAUSE_S)

    services.get_node = wait_for_node
    try:
        yield
    finally:
        services.get_node = get_node


def main() -> None:
    from ray.scripts.scripts import main as ray

    sys.argv = ["ray", "start", *sys.argv[1:]]
    with patient():
        ray()


if __name__ == "__main__":
    main()
