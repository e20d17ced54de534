"""Standard streams of short commands: closed, full, non-blocking, or with a limited character set."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.latents import write_latents


def run(*arguments: str, **how: object) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "dit_scale.cli", *arguments]
    done: subprocess.CompletedProcess[bytes] = subprocess.run(command, **how)  # type: ignore[call-overload]
    return done


@pytest.mark.parametrize("arguments", [("config",), ("config", "--json"), ("--help",), ("models", "DiT-S/8")])
def test_a_pipe_that_nobody_reads_ends_a_command_quietly(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*arguments, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


def test_a_full_disk_is_said() -> None:
    with open("/dev/full", "wb") as full:
        done = run("config", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == b"dit-scale: cannot write the output: No space left on device; redirect it\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m dit_scale.cli config {closed}"], capture_output=True
    )
    assert done.returncode == 0
    assert done.stderr == b""


def test_a_pipe_that_somebody_set_to_not_block() -> None:
    """Print more than the capacity of a pipe, to a slow reader."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    got: list[bytes] = []

    def read() -> None:
        with open(reader, "rb", buffering=0) as file:
            while piece := file.read(1024):
                got.append(piece)

    thread = threading.Thread(target=read)
    done = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(count=200_000)], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    thread.start()
    assert done.communicate()[1] == b""
    thread.join()
    assert done.returncode == 0
    assert b"".join(got) == b"x" * 200_000 + b"\n"


PROGRAM = """
import sys
from dit_scale.cli.streams import guarded

def command():
    print("x" * {count})
    return 0

sys.exit(guarded(command))
"""


@pytest.mark.parametrize("name", ["gr\xf6\xdfe", os.fsdecode(b"\xff")], ids=["umlauts", "not UTF-8"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_the_terminal_cannot_show(tmp_path: Path, name: str, encoding: str) -> None:
    write_latents(tmp_path / name, num=1)
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = run("latents", "info", str(tmp_path / name), capture_output=True, env=environment)
    assert done.stderr == b""
    assert done.returncode == 0
    assert b"1 of 10 classes" in done.stdout
