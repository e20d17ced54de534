"""A rank's side of supervision: it leaves a verdict, and does not outlive its supervisor."""

import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from dit_scale.elastic.exits import Exit, Verdict, write_verdict
from dit_scale.elastic.group import SUPERVISOR_VARIABLE
from dit_scale.elastic.heartbeat import FOLDER_VARIABLE, beat_path, read_beat
from dit_scale.errors import ConfigError, DitScaleError, StabilityError, WeightsError

HOPELESS = (ConfigError, WeightsError)
"""What a person must mend: another try would end in the same way. Other errors may pass."""


def supervised(work: Callable[[], int]) -> int:
    """Do a rank's work; where a supervisor watches, it is told how this ended."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if not folder:
        return work()
    _end_with(int(os.environ[SUPERVISOR_VARIABLE]))
    code, error = Exit.FAILED.value, None
    try:
        code = work()
    except BaseException as problem:
        error = problem
        raise
    finally:
        _leave_verdict(Path(folder), code, error)
    return code


def _leave_verdict(folder: Path, code: int, error: BaseException | None) -> None:
    rank = int(os.environ["RANK"])
    beat = read_beat(beat_path(folder, rank))
    name, message = "", ""
    if error is not None:
        code, name, message = exit_code(error), type(error).__name__, str(error)
    write_verdict(folder, Verdict(rank, code, beat.step if beat else 0, name, message))


def exit_code(error: BaseException) -> int:
    """What an error means for those who would start the run again."""
    if isinstance(error, StabilityError):
        return Exit.DO_NOT_RESTART
    return Exit.MISTAKE if isinstance(error, HOPELESS) else Exit.FAILED


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
