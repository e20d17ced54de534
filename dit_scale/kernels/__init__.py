"""Triton kernels for CUDA, each with a plain torch version elsewhere; the only package that imports triton.

A kernel must agree with its plain version, which runs on every other device. Tests run the kernels on a CPU
with Triton's interpreter, and compile them for a GPU that need not be there.
"""

import os
import shutil
from functools import cache
from importlib.util import find_spec


@cache
def missing() -> str:
    """What Triton lacks on this machine, for a message; empty if kernels can be compiled and launched."""
    if find_spec("triton") is None:
        return "triton is not installed"
    # Triton builds a small launcher for every kernel.
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        return "triton needs a C compiler: install gcc, or set CC"
    return ""
