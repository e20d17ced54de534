"""What a rank imports before its first step: this is most of the time that a restart takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from dit_scale.config import dump
from tests.dist import jobs
from tests.latents import write_latents

pytestmark = pytest.mark.dist


def test_eager_training_does_not_import_the_compiler(tmp_path: Path) -> None:
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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True False"
