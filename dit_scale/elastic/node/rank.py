"""A rank's side of supervision: heartbeats, a verdict, stacks on request; it dies with its supervisor."""

import faulthandler
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dit_scale.elastic.node.exits import Exit, Verdict, exit_code, write_verdict
from dit_scale.elastic.node.stacks import STACK_SIGNAL, stack_path
from dit_scale.errors import DitScaleError
from dit_scale.heartbeat import FOLDER_VARIABLE, Heart, beat_path, read_beat

SUPERVISOR_VARIABLE = "DIT_SCALE_SUPERVISOR"
"""Environment variable with the process id of the supervisor."""
TRANSPORTS = (
    "gloo",
    "ProcessGroup",
    "NCCL",
    "TCPStore",
    "Connection closed by peer",
    "Connection reset by peer",
)
"""Words in the messages of collectives that break because another rank has exited."""
REACH_S = 30.0
"""Longest wait for the node of rank 0 to respond to the other ranks."""


def supervised(work: Callable[[], int]) -> int:
    """Do a rank's work. Under a supervisor, record in a verdict how it ended."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if not folder:
        return work()
    rank = int(os.environ["RANK"])
    # From here on the supervisor knows this process, even if it is killed during its imports.
    Heart(rank)
    _die_with(int(os.environ[SUPERVISOR_VARIABLE]))
    code, error = Exit.FAILED.value, None
    with stack_path(Path(folder), rank).open("w") as stacks:
        faulthandler.register(STACK_SIGNAL, stacks)
        try:
            if rank:
                reach(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            code = work()
        except BaseException as problem:
            error = problem
            raise
        finally:
            _record_verdict(Path(folder), rank, code, error)
            faulthandler.unregister(STACK_SIGNAL)
            signal.signal(STACK_SIGNAL, signal.SIG_IGN)
    return code


def reach(address: str, port: int, within_s: float = REACH_S) -> None:
    """Check that the machine of rank 0 responds, even if rank 0 does not listen there yet.

    Raises DitScaleError if it does not: torch would wait for ten minutes, and its error says less.
    """
    end_s = time.monotonic() + within_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, end_s - time.monotonic())).close()
            return
        except ConnectionRefusedError:
            return
        except OSError as error:
            problem = error.strerror or str(error)
        if time.monotonic() > end_s:
            raise DitScaleError(
                f"the node of rank 0 does not respond at {address}:{port} within {within_s:g} s: {problem}; "
                "expected all nodes to reach each other on all ports. Check for a firewall between them, and "
                "that the other nodes can reach the --address of the first node"
            )
        time.sleep(0.5)


def _record_verdict(folder: Path, rank: int, code: int, error: BaseException | None) -> None:
    beat = read_beat(beat_path(folder, rank))
    name, message = "", ""
    if error is not None:
        code, name, message = exit_code(error), type(error).__name__, str(error)
    second_hand = error is not None and is_second_hand(error)
    verdict = Verdict(
        rank=rank,
        code=code,
        step=beat.step if beat else 0,
        error=name,
        message=message,
        phase=beat.phase.name if beat else "",
        second_hand=second_hand,
    )
    write_verdict(folder, verdict)


def is_second_hand(error: BaseException) -> bool:
    """Whether an error only says that another rank does not respond, and not why."""
    message = str(error)
    if not isinstance(error, RuntimeError) or "EADDRINUSE" in message:
        return False
    return type(error).__name__.startswith("Dist") or any(word in message for word in TRANSPORTS)


def _die_with(supervisor: int) -> None:
    """Kill this process as soon as its supervisor exits, even if the launcher survives."""
    try:
        handle = os.pidfd_open(supervisor)
    except ProcessLookupError:
        raise DitScaleError(
            f"the supervisor of this rank (process {supervisor}) has exited; use `dit-scale launch`"
        ) from None

    def wait() -> None:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="supervisor-watch", daemon=True).start()
