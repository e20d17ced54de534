"""How slow this machine is, for the limits of tests: no test fails because a machine is slow.

    TIMEOUT_S = scaled(400.0)

A limit is written for the reference machine, which had 2 cores, and grows by the factor that is measured
here. Processes that a test starts inherit the factor, so that all have the same limits.
"""

import json
import os
import statistics
import time

VARIABLE = "DIT_SCALE_TEST_SLOWNESS"
REFERENCE_S = 0.02
"""How long `_work` takes on one idle core of the reference machine, an AMD EPYC of 2024."""


def slowness() -> float:
    """How many times longer than on the reference machine work takes, at least 1; measured once."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = str(max(1.0, statistics.median(_work() for _ in range(9)) / REFERENCE_S))
    return float(os.environ[VARIABLE])


def scaled(limit_s: float) -> float:
    """Scale a limit in seconds of the reference machine to this machine."""
    return limit_s * slowness()


def _work() -> float:
    """Measure the seconds of a fixed piece of work: interpreted code and fp32 kernels, as in training."""
    import torch  # imported here, because most processes inherit the factor and do not need it

    begin_s = time.perf_counter()
    for _ in range(8):
        json.loads(json.dumps(list(range(4000))))
    x_TD = torch.ones(256, 256)
    for _ in range(40):
        x_TD = torch.nn.functional.layer_norm(x_TD @ x_TD, (256,))
    return time.perf_counter() - begin_s
