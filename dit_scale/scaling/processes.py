"""Commands of `dit-scale` as child processes of a study: logged, stopped on request, never orphaned."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dit_scale.signals import StopRequest

MODULE = "dit_scale.cli"
TICK_S = 0.5
LOG_LINES = 3
"""Lines at the end of a log that explain a failure."""
_PR_SET_PDEATHSIG = 1


def command_line(arguments: Sequence[str], processes: int = 1) -> list[str]:
    """Return the command of `dit-scale ARGUMENTS` on this many processes of this machine."""
    if processes == 1:
        return [sys.executable, "-m", MODULE, *arguments]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--no_local_rank"]
    return [*launcher, "--num_gpus", str(processes), "--module", MODULE, *arguments]


def run_command(
    command: Sequence[str], log: Path, stop: StopRequest, tick: Callable[[], None] = lambda: None
) -> int:
    """Run a command, append its output to a log, and return its exit code.

    A request to stop reaches the child as SIGTERM, so that a training run saves. So does the death of this
    process. `tick` is called about twice a second. A second Ctrl-C kills the child.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None)  # loaded here: after a fork, a child should only call what it has
    parent = os.getpid()

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before the call took effect
            os._exit(1)

    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C on the terminal reaches only this process, which passes it on
            preexec_fn=end_with_parent,
        )
    try:
        return _wait(child, stop, tick)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _wait(child: "subprocess.Popen[bytes]", stop: StopRequest, tick: Callable[[], None]) -> int:
    is_told = False
    while True:
        try:
            return child.wait(TICK_S)
        except subprocess.TimeoutExpired:
            tick()
        if stop.wanted and not is_told:
            child.terminate()
            is_told = True


def last_lines(log: Path) -> str:
    """Return the end of a log, to explain a failure."""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return "\n".join([line for line in lines if line.strip()][-LOG_LINES:])
