"""Processes of this node as the kernel shows them. The only module of dit_scale that imports psutil."""

import signal
from contextlib import suppress

import psutil

NOT_ALIVE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class ProcessTable:
    """Processes by id, each identified by its start time as of the first lookup.

    The kernel reuses process ids. A process that later gets the id of an exited one counts as dead here and
    receives none of its signals.
    """

    def __init__(self) -> None:
        self._processes: dict[int, psutil.Process | None] = {}

    def is_alive(self, pid: int) -> bool:
        """Whether the process runs or is stopped. Zombies are not alive."""
        status = self._status(pid)
        return status is not None and status not in NOT_ALIVE

    def is_stopped(self, pid: int) -> bool:
        """Whether the process was stopped by a signal. A process halted by a debugger was not."""
        return self._status(pid) == psutil.STATUS_STOPPED

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal, unless the process has exited."""
        process = self._find(pid)
        if process is not None:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _status(self, pid: int) -> str | None:
        process = self._find(pid)
        if process is None or not process.is_running():
            return None
        try:
            return str(process.status())
        except psutil.NoSuchProcess:
            return None

    def _find(self, pid: int) -> psutil.Process | None:
        if pid not in self._processes:
            try:
                self._processes[pid] = psutil.Process(pid)
            except psutil.NoSuchProcess:
                self._processes[pid] = None
        return self._processes[pid]


def is_alive(pid: int) -> bool:
    """Whether a process with this id is alive now. Zombies are not."""
    return ProcessTable().is_alive(pid)


def kill_marked(variable: str, value: str) -> bool:
    """Send SIGKILL to every process with this environment variable; whether there was any.

    Walks all processes of the node. Those of other users are skipped, zombies have no environment.
    """
    was_any = False
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(variable) == value:
            was_any = True
            with suppress(psutil.NoSuchProcess):
                process.kill()
    return was_any
