"""Processes that file permissions apply to, even when root runs the tests."""

import os
import shutil
import subprocess
import sys

from tests.support.needs import needs


def without_power(program: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code as the same user without capabilities."""
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        needs(shutil.which("setpriv") is not None, "setpriv")
        prefix = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    return subprocess.run([*prefix, sys.executable, "-c", program], capture_output=True, text=True)
