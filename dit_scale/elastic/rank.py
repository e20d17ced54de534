"""A rank's side of supervision: beats, a verdict, stacks when asked; no life without a supervisor."""

import faulthandler
import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from dit_scale.elastic.exits import Exit, Verdict, write_verdict
from dit_scale.elastic.group import STACK_SIGNAL, SUPERVISOR_VARIABLE, stack_path
from dit_scale.elastic.heartbeat import FOLDER_VARIABLE, Heart, beat_path, read_beat
from dit_scale.errors import ConfigError, DitScaleError, StabilityError, WeightsError

HOPELESS = (ConfigError, WeightsError)
"""What a person must mend: another try would end in the same way. Other errors may pass."""
TRANSPORTS = (
    "gloo",
    "ProcessGroup",
    "NCCL",
    "TCPStore",
    "Connection closed by peer",
    "Connection reset by peer",
)
"""Words in the messages of collectives that break when another rank has gone."""


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
            code = work()
        except BaseException as problem:
            error = problem
            raise
        finally:
            _leave_verdict(Path(folder), rank, code, error)
            faulthandler.unregister(STACK_SIGNAL)
            signal.signal(STACK_SIGNAL, signal.SIG_IGN)
    return code


def _leave_verdict(folder: Path, rank: int, code: int, error: BaseException | None) -> None:
    beat = read_beat(beat_path(folder, rank))
    name, message = "", ""
    if error is not None:
        code, name, message = exit_code(error), type(error).__name__, str(error)
    second_hand = error is not None and is_second_hand(error)
    write_verdict(folder, Verdict(rank, code, beat.step if beat else 0, name, message, second_hand))


def exit_code(error: BaseException) -> int:
    """What an error means for those who would start the run again."""
    if isinstance(error, StabilityError):
        return Exit.DO_NOT_RESTART
    return Exit.MISTAKE if isinstance(error, HOPELESS) else Exit.FAILED


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
