"""What counts as a living or a stopped process, on real processes of this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from dit_scale.elastic.node.processes import ProcessTable, is_alive, kill_marked

SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]
MARK = "DIT_SCALE_TEST_MARK"


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for the kernel to catch up."""
    end_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_process_is_alive_until_it_exits_and_a_zombie_is_not() -> None:
    table = ProcessTable()
    with subprocess.Popen(SLEEP) as process:
        assert table.is_alive(process.pid)
        assert is_alive(process.pid)
        process.kill()
        wait_until(lambda: not table.is_alive(process.pid))  # a zombie: nobody has waited for it
        assert not is_alive(process.pid)
    table.signal(process.pid, signal.SIGTERM)  # does nothing
    assert not table.is_alive(process.pid)


def test_a_stopped_process_is_alive_and_stopped() -> None:
    table = ProcessTable()
    with subprocess.Popen(SLEEP) as process:
        assert not table.is_stopped(process.pid)
        table.signal(process.pid, signal.SIGSTOP)
        wait_until(lambda: table.is_stopped(process.pid))
        assert table.is_alive(process.pid)
        table.signal(process.pid, signal.SIGCONT)
        wait_until(lambda: not table.is_stopped(process.pid))
        process.kill()


def test_a_process_under_a_debugger_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "status", lambda self: psutil.STATUS_TRACING_STOP)
    assert not ProcessTable().is_stopped(os.getpid())
    assert ProcessTable().is_alive(os.getpid())


def test_a_reused_id_does_not_stand_for_the_process_that_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table, sent = ProcessTable(), list[int]()
    with subprocess.Popen(SLEEP) as process:
        assert table.is_alive(process.pid)
        monkeypatch.setattr(psutil.Process, "__eq__", lambda self, other: False)  # another start time
        monkeypatch.setattr(psutil.os, "kill", lambda pid, number: sent.append(number))
        assert not table.is_alive(process.pid)
        assert not table.is_stopped(process.pid)
        table.signal(process.pid, signal.SIGUSR2)
        assert sent == []
        monkeypatch.undo()
        process.kill()


def test_a_process_that_exited_before_the_first_lookup_stays_dead() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    table = ProcessTable()
    assert not table.is_alive(process.pid)
    assert not table.is_stopped(process.pid)


def test_marked_processes_are_killed_and_others_are_not() -> None:
    mark = f"{os.getpid()}"
    with (
        subprocess.Popen(SLEEP, env=os.environ | {MARK: mark}) as marked,
        subprocess.Popen(SLEEP, env=os.environ | {MARK: mark + "0"}) as other,
    ):
        assert kill_marked(MARK, mark)
        assert marked.wait() == -signal.SIGKILL
        assert not kill_marked(MARK, mark)
        assert other.poll() is None
        other.kill()
