"""Completion by the Tab key, in a real bash."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_scale import cli, recipes
from tests.support.ranks.terminal import Terminal
from tests.support.speed import scaled

ASK = """
source <(dit-scale completion bash)
COMP_LINE="$1"
COMP_POINT=${#1}
_python_argcomplete dit-scale 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a PATH on which `dit-scale` is this program."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "dit-scale"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m dit_scale.cli "$@"\n')
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def completions(path: str, line: str, folder: Path | None = None) -> list[str]:
    """Return what bash offers at the end of a line."""
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", line],
        env=os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return [word.strip() for word in done.stdout.splitlines() if word]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dit-scale tra", ["train"]),
        ("dit-scale checkpoint ver", ["verify"]),
        ("dit-scale train demo --dr", ["--dry-run"]),
        ("dit-scale sample run --sampler dp", ["dpmpp_2m", "dpmpp_2m_sde"]),
        ("dit-scale train dit_xl2_", ["dit_xl2_256", "dit_xl2_512"]),
        ("dit-scale train encode_", []),
        ("dit-scale train demo optimizer.b", ["optimizer.betas="]),
        ("dit-scale train demo steps=3 ema.0.d", ["ema.0.decay="]),
        ("dit-scale launch demo engine.precision=", ["auto", "bf16", "fp32"]),
        ("dit-scale train demo engine.precision=b", ["bf16"]),
        ("dit-scale train demo log.tensorboard=t", ["true"]),
        ("dit-scale train demo optimizer.lr=", ["0.0001"]),
        ("dit-scale train demo no_such_key=", []),
        ("dit-scale encode --config demo vae_b", ["vae_batch="]),
        ("dit-scale config optimizer.cl", ["optimizer.clip_grad_norm"]),
    ],
)
def test_bash_completes(path: str, line: str, offered: list[str], tmp_path: Path) -> None:
    assert completions(path, line, tmp_path) == offered


def test_all_commands_and_the_recipes_of_encode_are_offered(path: str, tmp_path: Path) -> None:
    assert set(cli._parser()[1]) <= set(completions(path, "dit-scale ", tmp_path))
    own = [name for name in recipes.names() if name.startswith("encode_")]
    assert completions(path, "dit-scale encode --config ", tmp_path) == own


def test_files_are_offered_for_runs_and_paths(path: str, tmp_path: Path) -> None:
    (tmp_path / "runs_here" / "x").mkdir(parents=True)
    assert completions(path, "dit-scale train demo data.url=run", tmp_path) == ["runs_here/"]
    assert completions(path, "dit-scale status run", tmp_path) == ["runs_here/"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_is_one_that_bash_can_parse(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """zsh has the same script: it branches by the shell that runs it."""
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "dit-scale" in script


def test_a_key_at_a_terminal_completes_the_line(path: str) -> None:
    """A person types, and bash writes the rest of the word."""
    words = ["env", f"PATH={path}", f"PYTHONPATH={os.pathsep.join(filter(None, sys.path))}", "TERM=dumb"]
    terminal = Terminal([*words, "bash", "--norc", "-i"])
    seen = ""

    def read_until(text: str) -> None:
        nonlocal seen
        end_s = time.monotonic() + scaled(60.0)
        while text not in seen:
            assert time.monotonic() < end_s, seen
            seen += terminal.read()
            time.sleep(0.02)

    try:
        terminal.type("source <(dit-scale completion bash); echo read''y\n")
        read_until("\nready")
        terminal.type("dit-scale train dit_xl2_2\toptimizer.cl\t")
        read_until("dit-scale train dit_xl2_256 optimizer.clip_grad_norm=")
    finally:
        terminal.process.kill()
        terminal.process.wait()
        terminal.close()
