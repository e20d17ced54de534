"""Triton's interpreter: a process that executes kernels on a CPU, which Triton decides when it is imported.

with interpreter() as call:
    result = call(job, *args)        # job(*args) in that process; results are arrays
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.support.speed import scaled

Call = Callable[..., Any]
TIMEOUT_S = scaled(120.0)
"""Far more than any job takes; a slower process hangs."""


@contextmanager
def interpreter() -> Iterator[Call]:
    """Yield a function that executes jobs in a process with the interpreter."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        with patch.dict(os.environ, TRITON_INTERPRET="1"):
            processes.submit(os.getpid).result(TIMEOUT_S)
        yield lambda job, *args: processes.submit(job, *args).result(TIMEOUT_S)
