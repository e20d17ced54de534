"""Unexpected errors: one line on the screen that says what to do, and the traceback in a file."""

import errno
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dit_scale import cli
from dit_scale.cli.failures import MEMORY, report
from dit_scale.config import EncodeConfig, TrainConfig
from dit_scale.elastic.node.exits import read_verdict
from dit_scale.errors import DataError
from dit_scale.keys import groups
from tests.support.ranks.terminal import Terminal


def raised(error: Exception) -> Exception:
    """Return the error as a command's code raises it."""
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    return tmp_path / "run"


def line_of(capsys: pytest.CaptureFixture[str], error: Exception, **args: object) -> str:
    """Return the one line that is printed about an error."""
    assert report(raised(error), Namespace(**{"name": "dit-scale train", **args})) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_traceback_of_a_rank_is_in_the_run_folder(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    line = line_of(capsys, KeyError("a key\nin two lines"), run_folder=str(run))
    (kept,) = (run / "errors").iterdir()
    assert kept.name.endswith("-rank3.txt")
    assert line.startswith("dit-scale train: rank 3: KeyError: ")
    assert "If this looks like a bug, report it with its traceback" in line
    assert line.endswith(f". Traceback: {kept}")
    text = kept.read_text()
    assert text.startswith("dit-scale train\ndit-scale 0")
    assert text.count("Traceback (most recent call last)") == 1
    assert "raise error" in text


def test_a_run_that_has_no_folder_yet_gets_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line_of(capsys, ValueError("odd"), run_folder=str(tmp_path / "new"))
    assert len(list((tmp_path / "new" / "errors").iterdir())) == 1


@pytest.mark.parametrize("argument", ["run", "source"])
def test_commands_on_a_run_use_its_folder(
    run: Path, capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    line_of(capsys, ValueError("odd"), name="dit-scale sample", **{argument: str(run)})
    (kept,) = (run / "errors").iterdir()
    assert kept.name.endswith("-dit-scale-sample.txt")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "lower engine.micro_batch",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "engine.memory_gib"),
        (MemoryError(), "activation_checkpointing=block"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "Free some space"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "--master_port"),
        (RuntimeError("The server socket has failed to listen: EADDRINUSE"), "--master_port"),
        (
            RuntimeError("[gloo/pair.cc:1] Connection closed by peer"),
            "see what that rank printed. The same command resumes. (RuntimeError: Connection closed by peer)",
        ),
        (RuntimeError("ProcessGroupNCCL: CUDA error: out of memory"), "lower engine.micro_batch"),
        (OSError(errno.EIO, "Input/output error", "/x"), "Input/output error: '/x'"),
    ],
)
def test_known_causes_say_what_to_do(
    run: Path, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    line = line_of(capsys, error, run_folder=str(run))
    assert said in line
    assert "bug" not in line
    assert ". Details: " in line


@pytest.mark.parametrize("command", MEMORY)
def test_advice_on_memory_names_options_and_keys_that_exist(command: str) -> None:
    parser = cli._parser()[1][command.removeprefix("dit-scale ")]
    config = {"dit-scale train": TrainConfig, "dit-scale encode": EncodeConfig}.get(command)
    for option in re.findall(r"--[\w-]+", MEMORY[command]):
        assert option in parser._option_string_actions
    for key in re.findall(r"\w+\.\w+|vae_batch", MEMORY[command]):
        assert config is not None
        assert groups(config, [key])


def test_the_line_names_the_last_place_in_this_project(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error comes from a library that our code calls."""
    (run / "verdict-00000.json").write_text("garbage")
    with pytest.raises(json.JSONDecodeError) as caught:
        read_verdict(run, 0)
    assert report(caught.value, Namespace(name="dit-scale train", run_folder=str(run))) == 1
    assert "(dit_scale/elastic/node/exits.py:" in capsys.readouterr().err


def test_a_message_with_a_foreign_traceback_is_shortened_to_its_end(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'ray::decode() (pid=1)\n  File "/x/decoder.py", line 7, in read\nValueError: odd bytes'
    assert "RuntimeError: ValueError: odd bytes" in line_of(capsys, RuntimeError(text), run_folder=str(run))


def test_a_log_without_a_run_folder_gets_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.models, "_run", lambda _: 1 / 0)
    assert cli.main(["models"]) == 1
    *text, line = capsys.readouterr().err.splitlines()
    assert text[0] == "Traceback (most recent call last):"
    assert line.startswith(
        "dit-scale models: ZeroDivisionError: division by zero (dit_scale/cli/__init__.py:"
    )


def test_a_full_disk_does_not_hide_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "errors").touch()  # no folder can be made here
    assert report(raised(ValueError("odd")), Namespace(name="dit-scale train", run_folder=tmp_path)) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_terminal_without_a_run_folder_names_a_file(tmp_path: Path) -> None:
    code = "from dit_scale import cli; cli.models._run = lambda _: 1 / 0; cli.main(['models'])"
    os.environ["TMPDIR"], before = str(tmp_path), os.environ.get("TMPDIR")
    try:
        terminal = Terminal([sys.executable, "-c", code])
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
    assert terminal.process.wait(60) == 0
    said = terminal.read()
    terminal.close()
    (kept,) = tmp_path.glob("dit-scale-*/*-dit-scale-models.txt")
    assert f"Traceback: {kept}" in said
    assert "Traceback (most recent call last)" not in said
    assert "ZeroDivisionError" in kept.read_text()


@pytest.mark.parametrize("variable", ["", "1"])
def test_a_variable_shows_the_traceback_of_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("DIT_SCALE_TRACEBACK", variable)
    assert report(raised(DataError("no data")), Namespace(name="dit-scale train")) == 2
    *text, line = capsys.readouterr().err.splitlines()
    assert line == "dit-scale train: no data"
    assert bool(text) == bool(variable)


def test_an_error_in_a_real_process_exits_with_1() -> None:
    code = "from dit_scale import cli; cli.models._run = lambda _: 1 / 0; import sys; sys.exit(cli.main())"
    done = subprocess.run([sys.executable, "-c", code, "models"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("dit-scale models: ZeroDivisionError")
