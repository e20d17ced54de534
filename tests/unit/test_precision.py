"""Which precision `auto` selects, and that a run keeps it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_scale import dist
from dit_scale.checkpoint.manifest import CheckpointId
from dit_scale.config import TrainConfig
from dit_scale.dist import World
from dit_scale.errors import ConfigError
from dit_scale.storage import open_storage
from dit_scale.train.precision import choose_precision
from tests.support import checkpoints

CPU = torch.device("cpu")
SAY = "import torch; from dit_scale import dist; print(dist.choose_precision('auto', torch.device('cpu')))"


def has_instructions() -> bool:
    """Return the CPU flags that the kernel reports."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def config_of(run: Path, precision: str) -> TrainConfig:
    return TrainConfig.model_validate({"run": str(run), "engine": {"precision": precision, "device": "cpu"}})


@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="the instructions of this CPU are limited")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/cpuinfo")
def test_auto_is_bf16_with_hardware_support() -> None:
    assert dist.choose_precision("auto", CPU) == ("bf16" if has_instructions() else "fp32")


@pytest.mark.parametrize("limit", ["AVX2"])
def test_auto_is_fp32_if_onednn_would_emulate_bf16(limit: str) -> None:
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
    said = subprocess.run(
        [sys.executable, "-c", SAY], env=limited, check=True, capture_output=True, text=True
    )
    assert said.stdout == "fp32\n"


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_a_requested_precision_is_used(name: str) -> None:
    assert dist.choose_precision(name, CPU) == name


def test_a_new_run_selects_and_reports_its_precision(tmp_path: Path, world: World) -> None:
    config, note = choose_precision(config_of(tmp_path, "auto"), world)
    assert config.engine.precision == dist.choose_precision("auto", CPU)
    assert note.startswith(f"precision auto: {config.engine.precision}, this CPU ")


@pytest.mark.parametrize("begun", ["bf16", "fp32"])
def test_a_run_keeps_its_precision_unless_overridden(tmp_path: Path, world: World, begun: str) -> None:
    written = config_of(tmp_path, begun).model_dump(mode="json")
    checkpoints.write(open_storage(tmp_path), CheckpointId(40, 1), [[]], config=written)
    config, note = choose_precision(config_of(tmp_path, "auto"), world)
    assert (config.engine.precision, note) == (
        begun,
        f"precision auto: {begun}, the precision of the newest checkpoint",
    )
    told = "fp32" if begun == "bf16" else "bf16"
    assert choose_precision(config_of(tmp_path, told), world)[0].engine.precision == told


def test_bf16_without_hardware_support_is_used_with_a_warning(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has, warned in ((True, False), (False, True)):
        monkeypatch.setattr(dist, "multiplies_bf16", lambda _, has=has: has)
        config, note = choose_precision(config_of(tmp_path, "bf16"), world)
        assert (config.engine.precision, "8 to 10 times slower" in note) == ("bf16", warned)
        assert choose_precision(config_of(tmp_path, "fp32"), world)[1] == ""


def test_a_backend_that_cannot_compute_in_the_chosen_precision_is_refused(
    tmp_path: Path, world: World
) -> None:
    checkpoints.write(
        open_storage(tmp_path),
        CheckpointId(40, 1),
        [[]],
        config=config_of(tmp_path, "fp32").model_dump(mode="json"),
    )
    config = TrainConfig.model_validate({"run": str(tmp_path), "model": {"attention": "flash4"}})
    with pytest.raises(
        ConfigError, match=r"flash4 computes only in bf16 .*precision auto: fp32, the precision"
    ):
        choose_precision(config, world)
