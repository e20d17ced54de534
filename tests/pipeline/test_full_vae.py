"""The encoding job with a full-size autoencoder, compared with a plain loop; compiled encoders."""

import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from dit_scale.config import EncodeConfig
from dit_scale.data.shards import LatentDataset
from dit_scale.vae import load
from dit_scale.vae_files import find_vae
from dit_scale_pipeline.encoder import Encoder
from tests.support.adm_crop import adm_crop
from tests.support.encoding import clean_environment, job_command
from tests.support.live_bytes import LiveBytes
from tests.support.speed import scaled
from tests.support.tiny_vae import save_full_vae, save_tiny_vae

pytestmark = pytest.mark.pipeline

NUM_PARAMETERS = 83_653_863
THREADS = 2
OTHER_BATCH_TOLERANCE = 2e-3
"""Largest difference of moments between VAE batch sizes, relative to the standard deviation of all moments.

fp16 storage alone rounds by up to 5e-4 of a value; convolutions over another number of images may add
in another order.
"""


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_full_vae(tmp_path_factory.mktemp("full") / "vae")


def write_images(folder: Path, number: int) -> list[Path]:
    """Write smooth images with fine noise, of odd sizes, with and without halving in the crop."""
    draws = np.random.default_rng(0)
    paths = []
    for index, size in enumerate([(1100, 1063), (527, 700)][:number]):
        coarse = Image.fromarray(draws.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(picture + draws.integers(-12, 13, picture.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"c{index}" / "x.jpg")
        paths[-1].parent.mkdir(parents=True)
        Image.fromarray(noisy).save(paths[-1], quality=92)
    return paths


def plain_loop(vae: str, paths: list[Path], size: int, batch: int) -> npt.NDArray[np.float32]:
    """Encode like the paper's code: crop, scale, encode image and mirror => (N, 2, 8, size/8, size/8)."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS
    crops = np.stack([adm_crop(Image.open(path).convert("RGB"), size) for path in paths])
    x_N3HW = torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous().float().div(255).sub(0.5).div(0.5)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    moments = []
    with torch.no_grad():
        for x_B3HW in x_N3HW.split(batch):
            views = [model.encode(view).latent_dist for view in (x_B3HW, x_B3HW.flip(3))]
            moments.append(torch.stack([torch.cat([view.mean, view.std], 1) for view in views], 1))
    torch.set_num_threads(before)
    return torch.cat(moments).numpy()


@pytest.mark.parametrize(
    ("size", "num_images"),
    [(128, 2), *(pytest.param(*case, marks=pytest.mark.long) for case in ((256, 2), (512, 1)))],
)
def test_latents_are_those_of_a_plain_loop(vae: str, size: int, num_images: int, tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images", num_images)
    command = job_command(f"source={tmp_path}/images", f"output={tmp_path}/out", f"vae={vae}")
    command += [f"image_size={size}", f"vae_batch={num_images}", f"threads_per_encoder={THREADS}"]
    ran = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=scaled(400.0)
    )
    assert ran.returncode == 0, ran.stderr

    dataset = LatentDataset.open(tmp_path / "out")
    ours = np.stack([dataset.read(number)[0] for number in range(num_images)])
    assert np.array_equal(ours, plain_loop(vae, paths, size, num_images).astype(np.float16)), "the same batch"
    if num_images > 1:
        alone = plain_loop(vae, paths, size, 1)
        largest = np.abs(ours - alone).max() / alone.std()
        print(f"largest difference to batches of one image: {largest:.2e} of the moments' deviation")
        assert largest < OTHER_BATCH_TOLERANCE


def test_decoding_needs_the_memory_of_one_slice(vae: str) -> None:
    """Live bytes of a tile of 32 images, counted on the meta device: in slices, and in one pass."""
    decoder = load(vae, "meta")
    for size, largest in ((256, 3.5e9), (512, 3.5e9), (1024, 10e9)):
        z_BChw = torch.empty(32, 4, size // 8, size // 8, device="meta")
        with LiveBytes() as in_slices:
            decoder.decode(z_BChw)
        with LiveBytes() as in_one_pass:
            decoder.reconstruct(z_BChw)
        print(f"{size} px: {in_slices.peak / 1e9:.2f} GB in slices, {in_one_pass.peak / 1e9:.2f} in one pass")
        assert in_slices.peak < min(largest, 0.6 * in_one_pass.peak)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_encoder_makes_nearly_the_same_latents(tmp_path: Path) -> None:
    vae = save_tiny_vae(tmp_path / "vae")
    crops = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)

    def encode(compile: bool) -> npt.NDArray[np.float16]:
        config = EncodeConfig(vae=vae, vae_batch=4, precision="bf16", channels_last=True, compile=compile)
        encoder = Encoder(config, find_vae(vae).identity, "cpu")
        first, again = (encoder.encode(crops[:number], encoder.runtime()) for number in (4, 2))
        assert np.array_equal(first[:2], again), "a short batch is filled up, and not compiled for"
        return first

    eager, compiled = encode(False), encode(True)
    assert not np.array_equal(eager, compiled)
    assert np.abs(compiled - eager.astype(np.float32)).max() < 0.1 * eager.astype(np.float32).std()
