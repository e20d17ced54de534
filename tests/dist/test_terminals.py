"""Closed terminals and pipes, full outputs, and terminating signals: the run saves or continues."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dit_scale import signals
from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import CheckpointId
from dit_scale.config import TrainConfig, dump
from dit_scale.journal import read_journal
from dit_scale.train.run_folder import root_of
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.terminal import Terminal
from tests.support.speed import scaled

pytestmark = pytest.mark.dist

TIMEOUT_S = scaled(120.0)
ENDLESS = 100_000


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    write_latents(tmp_path / "data", num=8)
    return jobs.saving(jobs.small_config(tmp_path / "run", tmp_path / "data"), ENDLESS, every_steps=ENDLESS)


def command(config: TrainConfig, *more: str) -> list[str]:
    path = Path(config.run).parent / "config.yaml"
    path.write_text(dump(config))
    return [sys.executable, "-m", "dit_scale.cli", "train", str(path), *more]


def events(config: TrainConfig) -> list[dict[str, Any]]:
    return read_journal(Path(config.run) / "events.jsonl")


def wait_for_step(config: TrainConfig, step: int, look: Callable[[], object] = lambda: None) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not any(event["step"] >= step for event in events(config)):
        assert time.monotonic() < end_s, f"step {step} was not reached"
        look()
        time.sleep(0.02)


def saved_where_it_stopped(config: TrainConfig) -> None:
    """Check that the last completed step is committed and that the journal is complete."""
    last = events(config)[-1]
    assert last["event"] == "waited"
    (newest,) = committed(root_of(config))
    assert newest == CheckpointId(last["step"], 1)


@pytest.mark.parametrize("number", signals.ALL, ids=lambda one: one.name)
def test_terminating_signals_lead_to_a_save(config: TrainConfig, number: signal.Signals) -> None:
    with subprocess.Popen(command(config), stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(config, 2)
        process.send_signal(number)
        process.send_signal(signal.SIGTERM)  # a scheduler that does not wait
        said = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 75, said
    assert "Traceback" not in said
    saved_where_it_stopped(config)


def test_a_closed_terminal_leads_to_a_save(config: TrainConfig) -> None:
    terminal = Terminal(command(config))
    wait_for_step(config, 2, terminal.read)
    terminal.close()
    assert terminal.process.wait(TIMEOUT_S) == 75
    saved_where_it_stopped(config)


def test_under_nohup_a_run_continues_without_its_terminal(config: TrainConfig) -> None:
    terminal = Terminal(command(config), before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_step(config, 2, terminal.read)
    terminal.close()
    wait_for_step(config, events(config)[-1]["step"] + 20)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(TIMEOUT_S) == 75
    saved_where_it_stopped(config)


@pytest.mark.parametrize("redirection", ["2>&1 | head -n 1", "> /dev/full 2>&1", "<&- >&- 2>&-"])
def test_a_run_survives_the_loss_of_its_output(config: TrainConfig, redirection: str) -> None:
    """Other code must not write into a file of the run because it took a closed stream's descriptor."""
    short = config.model_copy(update={"steps": 20})
    words = [*command(short), "; echo $? >", str(Path(config.run).parent / "code")]
    script = " ".join(words[:-2]) + f" {words[-2]} {words[-1]}"
    subprocess.run(["sh", "-c", f"{{ {script}; }} {redirection}"], timeout=TIMEOUT_S, capture_output=True)
    assert (Path(config.run).parent / "code").read_text() == "0\n"
    assert [line["step"] for line in map(json.loads, jobs.losses_so_far(config))] == list(range(1, 21))
    assert events(config)[-1]["event"] == "done"


def test_signals_to_the_deepspeed_process_group_lead_to_a_save(config: TrainConfig) -> None:
    """What a terminal does: the two launchers exit, and the ranks continue until they have saved."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "-q", "--num_gpus", "2", "--no_local_rank"]
    words = [*launcher, "--module", *command(config)[2:]]
    with subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        wait_for_step(config, 2)
        os.killpg(process.pid, signal.SIGHUP)
        process.wait(TIMEOUT_S)
    wait_for_end(process.pid)
    saved_where_it_stopped(config)


def wait_for_end(session: int) -> None:
    """Wait until no process of a session is left."""
    end_s = time.monotonic() + TIMEOUT_S
    while any(_session(path) == session for path in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < end_s
        time.sleep(0.05)


def _session(process: Path) -> int:
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # exited in the meantime
        return 0
    return int(fields[3]) if fields[0] != "Z" else 0


SLOW_MODULE = "import pathlib, time\npathlib.Path({path!r}).touch()\ntime.sleep(600)\n"


def importing(tmp_path: Path, words: Sequence[str]) -> "subprocess.Popen[str]":
    """Start a command and wait until it hangs in its first slow import."""
    (tmp_path / "slow").mkdir()
    reached = tmp_path / "reached"
    for name in ("pydantic", "torch"):
        (tmp_path / "slow" / f"{name}.py").write_text(SLOW_MODULE.format(path=str(reached)))
    path = f"{tmp_path / 'slow'}:{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(
        words, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )
    end_s = time.monotonic() + TIMEOUT_S
    while not reached.exists():
        assert time.monotonic() < end_s
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda one: one.name)
@pytest.mark.parametrize(("name", "code"), [("train", 75), ("launch", 75), ("encode", 130)])
def test_a_signal_during_imports_exits_with_a_code_and_one_line(
    tmp_path: Path, name: str, code: int, number: signal.Signals
) -> None:
    option = ["--config"] if name == "encode" else []
    process = importing(tmp_path, [sys.executable, "-m", "dit_scale.cli", name, *option, "demo"])
    process.send_signal(number)
    said = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == code
    (line,) = said.splitlines()
    assert line.startswith(f"dit-scale {name}: ")
