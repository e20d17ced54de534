"""Encoding on CUDA: the same bits in every process, and the CPU's latents within stated tolerances."""

import multiprocessing
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from dit_scale.config import EncodeConfig
from dit_scale.vae_files import find_vae
from dit_scale_pipeline.encoder import Encoder
from tests.support.encoding import clean_environment, job_command, objects, write_images
from tests.support.tiny_vae import save_full_vae, save_tiny_vae

DEVICE = "cuda"
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16", "channels_last": True},
    "compiled": {"precision": "bf16", "channels_last": True, "compile": True},
}
TOLERANCES = {"fp32": 2e-3, "bf16": 0.1, "compiled": 0.1}
"""Largest difference to the CPU's fp32 moments, relative to the standard deviation of all moments."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: torch sees no device"),
]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_full_vae(tmp_path_factory.mktemp("cuda") / "vae")


def moments(vae: str, device: str, setting: dict[str, Any]) -> npt.NDArray[np.float16]:
    """Return two crops of 256 pixels, encoded in this process."""
    config = EncodeConfig(vae=vae, image_size=256, vae_batch=2, threads_per_encoder=2, **setting)
    encoder = Encoder(config, find_vae(vae).identity, device)
    draws = np.random.default_rng(0)
    small = draws.integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    crops = [np.asarray(Image.fromarray(image).resize((256, 256))) for image in small]
    return encoder.encode(np.stack(crops), encoder.runtime())


@pytest.fixture(scope="module")
def on_cpu(vae: str) -> npt.NDArray[np.float32]:
    return moments(vae, "cpu", {}).astype(np.float32)


@pytest.mark.parametrize("name", SETTINGS)
def test_processes_agree_on_bits_and_with_the_cpu_within_tolerance(
    name: str, vae: str, on_cpu: npt.NDArray[np.float32]
) -> None:
    found = []
    for _ in range(2):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(moments, (vae, DEVICE, SETTINGS[name])))
    assert np.array_equal(*found)
    largest = np.abs(found[0] - on_cpu).max() / on_cpu.std()
    print(f"{name}: largest difference to the CPU {largest:.2e} of the moments' deviation")
    assert largest < TOLERANCES[name]


def test_one_and_two_encoders_on_a_device_make_the_same_shards(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 40)
    vae = save_tiny_vae(tmp_path / "vae")
    sets = []
    for number, share in ((1, 1.0), (2, 0.5)):
        command = job_command(f"source={tmp_path}/images", f"output={tmp_path}/{number}", f"vae={vae}")
        command += ["image_size=64", "vae_batch=4", "shard_samples=10", "cpus_per_encoder=0.5"]
        command += [f"device={DEVICE}", f"encoders={number}", f"gpus_per_encoder={share}"]
        ran = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        sets.append(objects(tmp_path / str(number)))
    assert sets[0].keys() == sets[1].keys()
    assert [key for key in sets[0] if sets[0][key] != sets[1][key]] == []
