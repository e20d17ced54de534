"""A rank's side of supervision: beats, a verdict, stacks when asked; no life without a supervisor."""

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
from dit_scale.elastic.node.group import SUPERVISOR_VARIABLE
from dit_scale.elastic.node.stacks import STACK_SIGNAL, stack_path
from dit_scale.errors import DitScaleError
from dit_scale.heartbeat import FOLDER_VARIABLE, Heart, beat_path, read_beat

TRANSPORTS = (
    "gloo",
    "ProcessGroup",
    "NCCL",
    "TCPStore",
    "Connection closed by peer",
    "Connection reset by peer",
)
"""Words in the messages of collectives that break when another rank has gone."""


REACH_S = 30.0
"""Time in which the node of rank 0 must answer to the others."""


def supervised(work: Callable[[], int]) -> int:
    """Do a rank's work; where a supervisor watches, it is told how this ended."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if not folder:
        return work()
    rank = int(os.environ["RANK"])
    # The supervisor knows this process from here on, also when it is killed while it imports.
    Heart(rank)
    _end_with(int(os.environ[SUPERVISOR_VARIABLE]))
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
            _leave_verdict(Path(folder), rank, code, error)
            faulthandler.unregister(STACK_SIGNAL)
            signal.signal(STACK_SIGNAL, signal.SIG_IGN)
    return code


def reach(address: str, port: int, within_s: float = REACH_S) -> None:
    """See that the machine where the ranks will meet answers, if only that nobody listens there yet.

    Raises DitScaleError when it does not: torch would wait for ten minutes, and say less.
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
                f"the node of rank 0 does not answer at {address}:{port} within {within_s:g} s: {problem}; "
                "expected that all nodes reach each other at all ports. Is a firewall between them, is the "
                "--address of the first node one that the others can reach?"
            )
        time.sleep(0.5)


def _leave_verdict(folder: Path, rank: int, code: int, error: BaseException | None) -> None:
    beat = read_beat(beat_path(folder, rank))
    name, message = "", ""
    if error is not None:
        code, name, message = exit_code(error), type(error).__name__, str(error)
    second_hand = error is not None and is_second_hand(error)
    step, section = (beat.step, beat.section.name) if beat else (0, "")
    write_verdict(folder, Verdict(rank, code, step, name, message, section, second_hand))


def is_second_hand(error: BaseException) -> bool:
    """Whether an error says that another rank does not answer, and nothing of what happened to that one."""
    message = str(error)
    if not isinstance(error, RuntimeError) or "EADDRINUSE" in message:
        return False
    return type(error).__name__.startswith("Dist") or any(word in message for word in TRANSPORTS)


def _end_with(supervisor: int) -> None:
    """Have this process killed as soon as its supervisor is gone, also when the launcher lives on."""
    try:
        handle = os.pidfd_open(supervisor)
    except ProcessLookupError:
        raise DitScaleError("the supervisor of this rank is gone; start it by `dit-scale launch`") from None

    def wait() -> None:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="supervisor-watch", daemon=True).start()
