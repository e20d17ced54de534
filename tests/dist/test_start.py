"""What happens before the first step: imports, which dominate a restart, and the rendezvous of the ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dit_scale.config import dump
from tests.support.faults.ports import free_port
from tests.support.latents import write_latents
from tests.support.ranks import jobs

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("world", [1, 2])
def test_eager_training_does_not_import_the_compiler(tmp_path: Path, world: int) -> None:
    write_latents(tmp_path / "latents", num=8)
    config = tmp_path / "config.yaml"
    small = jobs.small_config(tmp_path / "run", tmp_path / "latents")
    config.write_text(dump(small.model_copy(update={"steps": 1})))
    script = f"""
import sys
from dit_scale import cli
assert cli.main(["train", {str(config)!r}]) == 0
print("deepspeed" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
"""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    for rank in ranks:
        said, _ = rank.communicate()
        assert said.splitlines()[-1] == f"{world > 1} False"  # a single process does not use DeepSpeed


def test_a_port_in_use_is_reported(tmp_path: Path) -> None:
    write_latents(tmp_path / "latents", num=8)
    config = tmp_path / "config.yaml"
    config.write_text(dump(jobs.small_config(tmp_path / "run", tmp_path / "latents")))
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-m", "dit_scale.cli", "train", str(config)],
            capture_output=True,
            text=True,
            env=os.environ | launched,
        )
    assert done.returncode == 2
    assert f"dit-scale train: port {port} is in use (EADDRINUSE), possibly by another run" in done.stderr
    assert "--master_port" in done.stderr
    assert "Traceback" not in done.stderr
