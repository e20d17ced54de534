"""Benchmark encoding: image decoding, the pipeline around the VAE, and the VAE.

    python -m benchmarks.encode
    python -m benchmarks.encode --vae stabilityai/sd-vae-ft-ema --image-sizes 256 512    # with CUDA
    python -m benchmarks.encode --smoke

- `decode`: images/s of a decoding task in one process, compared to a plain Pillow loop (open, convert,
  the same crop, array) on JPEGs of ImageNet's typical size. Both alternate; figures are medians over the
  rounds.
- `pipeline`: images/s of the job with a stub encoder that sleeps for a fixed time per image, from the
  first task to the last shard on disk, divided by images/s of that stub alone. Ray is already running.
- `encoder`: images/s of an encoder for both views, from crops in host memory to latents in host memory,
  for each precision and layout, compared to a plain loop over diffusers' AutoencoderKL on the same crops.
  They alternate, each in its own process. The share is relative to a bf16 matrix product in the same process
  (docs/performance.md).
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console

from benchmarks.train_step import cpu_name, versions
from dit_scale.config import EncodeConfig
from dit_scale.data.pixels import Pixels
from dit_scale.data.shards import VaeIdentity
from dit_scale.dist import multiplies_bf16
from dit_scale.telemetry.matmul import matmul_flops_per_s
from dit_scale.vae_files import find_vae
from dit_scale_pipeline.decoder import read_batch
from dit_scale_pipeline.encoder import VIEWS, Encoder
from dit_scale_pipeline.flow import Flow
from dit_scale_pipeline.inputs import Listing, open_input
from dit_scale_pipeline.output import plan_shards
from dit_scale_pipeline.ray_cluster import Placement, cluster, start_encoders
from dit_scale_pipeline.shards_writer import ShardRecord
from tests.support.tiny_vae import save_full_vae, save_tiny_vae

WIDTH, HEIGHT, QUALITY = 500, 375, 95
"""A typical ImageNet JPEG, about 110 kB."""
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
    "bf16, channels last, compiled": {"precision": "bf16", "channels_last": True, "compile": True},
}
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
DOWNSAMPLE, CHANNELS = 8, 4
PACKAGES = ("dit-scale", "torch", "diffusers", "ray", "pillow", "numpy")

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the requested parts and print one line per row."""
    args = _parser().parse_args(argv)
    if args.smoke:
        args.images, args.rounds, args.batches, args.vae_batch = 8, 1, 4, 2
        args.image_sizes, args.stub_images_per_s, args.matmul_side = [32], 100.0, 128
    if args.vae_batch is None:
        args.vae_batch = 64 if torch.cuda.is_available() else 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", args.images)
        for row in measure(folder, args):
            row |= {"versions": versions(PACKAGES)}
            print(json.dumps(row) if args.json else _text(row), flush=True)
    return 0


def measure(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of the requested parts."""
    if "decode" in args.parts:
        for size in args.image_sizes:
            yield decode(folder / "images", size, args.rounds)
    if "pipeline" in args.parts:
        yield pipeline(folder, args)
    if "encoder" in args.parts:
        vae = args.vae or (save_tiny_vae if args.smoke else save_full_vae)(folder / "vae")
        for size in args.image_sizes:
            yield from encoder(vae, size, args)


def write_images(folder: Path, number: int) -> None:
    """Write smooth images with noise at two scales, in two classes."""
    draws = np.random.default_rng(0)
    for index in range(number):
        picture = np.zeros((HEIGHT, WIDTH, 3))
        for cells, strength in ((8, 110), (64, 40), (WIDTH, 14)):
            grain = draws.integers(-strength, strength + 1, (cells * HEIGHT // WIDTH, cells, 3))
            grain_image = Image.fromarray((grain + 128).astype(np.uint8)).resize((WIDTH, HEIGHT))
            picture += np.asarray(grain_image, np.float64) - 128
        path = folder / f"c{index % 2}" / f"{index:05d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def decode(images: Path, size: int, rounds: int) -> Row:
    """Compare a decoding task to plain Pillow."""
    listing = open_input(str(images)).list()
    paths = [images / path for path in listing.paths]

    def plain() -> Pixels:
        return np.stack([_plain_crop(Image.open(path).convert("RGB"), size) for path in paths])

    def task() -> Pixels:
        return read_batch(str(images), listing.kind, listing.entries(), size)[0]

    assert np.array_equal(plain(), task()), "both must produce the same crops"
    times = [(_seconds(task), _seconds(plain)) for _ in range(rounds)]
    task_s, plain_s = (median(column) for column in zip(*times, strict=True))
    num_bytes = sum(path.stat().st_size for path in paths) / len(paths)
    return {
        "what": "decode",
        "device": cpu_name(),
        "image_size": size,
        "file_bytes": round(num_bytes),
        "images_per_s": len(paths) / task_s,
        "plain_images_per_s": len(paths) / plain_s,
        "ratio": plain_s / task_s,
    }


def _plain_crop(image: Image.Image, size: int) -> Pixels:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def stub_of(images_per_s: float) -> type[Encoder]:
    """Make an encoder class that sleeps for as long as a VAE of this speed takes."""

    class Stub(Encoder):
        def runtime(self) -> dict[str, str]:
            return {"device": "none"}

        def encode(self, pixels_BHW3: Pixels, runtime: dict[str, str]) -> npt.NDArray[np.float16]:
            time.sleep(self._config.vae_batch / images_per_s)
            side = pixels_BHW3.shape[1] // DOWNSAMPLE
            return np.zeros((len(pixels_BHW3), len(VIEWS), 2 * CHANNELS, side, side), np.float16)

    return Stub


def pipeline(folder: Path, args: argparse.Namespace) -> Row:
    """Compare the job with a stub encoder to the stub alone."""
    config = EncodeConfig(
        source=str(folder / "images"),
        output=str(folder / "out"),
        image_size=args.image_sizes[0],
        vae_batch=args.vae_batch if args.smoke else 32,
        shard_samples=256,
        cpus_per_encoder=0.1,
        cpus_per_decoder=0.9 if (os.cpu_count() or 1) < 4 else 1.0,
        ray_address="local",
    )
    once = open_input(config.source).list()
    repeats = -(-args.batches * config.vae_batch // len(once))
    listing = Listing(once.kind, once.class_names, list(once.paths) * repeats, np.tile(once.labels, repeats))
    identity = VaeIdentity(
        name="stub", weights_sha256="", scale=1.0, downsample=DOWNSAMPLE, latent_channels=CHANNELS
    )
    kind = stub_of(args.stub_images_per_s)
    stub = kind(config, identity, "cpu")
    crops = np.zeros((config.vae_batch, config.image_size, config.image_size, 3), np.uint8)
    alone = config.vae_batch / median(_seconds(lambda: stub.encode(crops, {})) for _ in range(3))
    with cluster("local"):
        placement = Placement("cpu", 1, max(1, (os.cpu_count() or 2) - 1))
        encoders, runtime = start_encoders(config, identity, placement, Console(stderr=True), kind)
        flow = Flow(
            config,
            listing,
            shards=plan_shards(listing, config.shard_samples),
            encoders=encoders,
            num_decoders=placement.decoders,
            runtime=runtime,
            latent_channels=CHANNELS,
        )
        begin_s = time.perf_counter()
        records = [event for event in flow.run() if isinstance(event, ShardRecord)]
        spent_s = time.perf_counter() - begin_s
    num_images = sum(record.samples for record in records)
    assert num_images == len(listing)
    return {
        "what": "pipeline",
        "device": cpu_name(),
        "image_size": config.image_size,
        "images": num_images,
        "stub_images_per_s": alone,
        "images_per_s": num_images / spent_s,
        "efficiency": num_images / spent_s / alone,
    }


def encoder(vae: str, size: int, args: argparse.Namespace) -> Iterator[Row]:
    """Compare every setting to plain loops, alternating within each round."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    crops = np.random.default_rng(0).integers(0, 256, (args.vae_batch, size, size, 3), dtype=np.uint8)
    dtypes = PLAIN if multiplies_bf16(device) else {"fp32": torch.float32}
    settings = {name: setting for name, setting in SETTINGS.items() if setting["precision"] in dtypes}
    if device.type == "cpu":  # compilation takes longer than encoding
        settings = {name: setting for name, setting in settings.items() if "compile" not in setting}
    ways: dict[str, Callable[[], object]] = {}
    for name, setting in settings.items():
        config = EncodeConfig(
            vae=vae,
            image_size=size,
            vae_batch=args.vae_batch,
            threads_per_encoder=torch.get_num_threads(),
            **setting,
        )
        ours = Encoder(config, find_vae(vae).identity, device.type)
        ways[name] = lambda ours=ours: ours.encode(crops, ours.runtime())  # type: ignore[misc]
    plain = [f"plain {name}" for name in dtypes]
    times: dict[str, list[float]] = {name: [] for name in (*ways, *plain)}
    # The plain loop has a process of its own, because an encoder changes how its process gets memory.
    with multiprocessing.get_context("spawn").Pool(1, _begin_plain, (vae, dtypes, device, crops)) as other:
        for way in ways.values():
            way()
        for name in plain:
            other.apply(_time_plain, (name,))
        for _ in range(args.rounds):
            for name, way in ways.items():
                times[name].append(_seconds(way))
            for name in plain:
                times[name].append(other.apply(_time_plain, (name,)))
    flops = _flops_per_image(vae, size, device)
    matmul = matmul_flops_per_s(torch.bfloat16, device, args.matmul_side)
    speeds = {name: args.vae_batch / median(column) for name, column in times.items()}
    for name in ways:
        yield {
            "what": "encoder",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "setting": name,
            "image_size": size,
            "vae_batch": args.vae_batch,
            "images_per_s": speeds[name],
            "share_of_matmul": speeds[name] * flops / matmul,
            "matmul_flops_per_s": matmul,
            **{f"times_{other}": speeds[name] / speeds[other] for other in plain},
        }


_plain: dict[str, Callable[[], object]] = {}
"""The plain loops of this process."""


def _begin_plain(vae: str, dtypes: dict[str, torch.dtype], device: torch.device, crops: Pixels) -> None:
    for name, dtype in dtypes.items():
        _plain[f"plain {name}"] = _plain_loop(vae, dtype, device, crops)


def _time_plain(name: str) -> float:
    return _seconds(_plain[name])


def _plain_loop(vae: str, dtype: torch.dtype, device: torch.device, crops: Pixels) -> Callable[[], object]:
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).to(device, dtype).eval()

    @torch.no_grad()
    def encode() -> list[torch.Tensor]:
        x_B3HW = torch.from_numpy(crops).permute(0, 3, 1, 2).to(device, dtype).div(255).sub(0.5).div(0.5)
        return [model.encode(view).latent_dist.parameters.cpu() for view in (x_B3HW, x_B3HW.flip(3))]

    return encode


def _flops_per_image(vae: str, size: int, device: torch.device) -> float:
    """Count the FLOP of both views of an image with torch."""
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).to(device).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(torch.zeros(1, 3, size, size, device=device))
    return len(VIEWS) * float(counter.get_total_flops())


def _seconds(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def _text(row: Row) -> str:
    where = f"{row['what']:9} {row['image_size']} px: {row['images_per_s']:8.1f} images/s"
    match row["what"]:
        case "decode":
            plain = f"plain Pillow {row['plain_images_per_s']:.1f}, ratio {row['ratio']:.3f}"
            return f"{where} per core; {plain}; files of {row['file_bytes'] / 1e3:.0f} kB; {row['device']}"
        case "pipeline":
            return (
                f"{where} with a stub of {row['stub_images_per_s']:.1f}: efficiency {row['efficiency']:.3f} "
                f"over {row['images']} images; {row['device']}"
            )
    ratios = ", ".join(f"{value:.2f} {key.replace('_', ' ')}" for key, value in row.items() if "times" in key)
    return (
        f"{where}, {row['setting']}, batch {row['vae_batch']}: {row['share_of_matmul']:.1%} of "
        f"{row['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s, {ratios}; {row['device']}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--parts", nargs="+", default=["decode", "pipeline", "encoder"], metavar="PART", help="(default: all)"
    )
    parser.add_argument("--vae", help="folder or hub name (default: random weights of the real size)")
    parser.add_argument("--image-sizes", nargs="+", type=int, default=[256, 512], metavar="SIZE")
    parser.add_argument("--images", type=int, default=256, help="JPEGs to generate (default 256)")
    parser.add_argument("--vae-batch", type=int, help="images per VAE pass (default 64 with CUDA, else 2)")
    parser.add_argument(
        "--batches", type=int, default=128, help="pipeline batches of 32 images (default 128)"
    )
    parser.add_argument(
        "--stub-images-per-s",
        type=float,
        default=100.0,
        help="speed of the pipeline's stub encoder (default 100)",
    )
    parser.add_argument(
        "--matmul-side", type=int, help="side of the matrices (default 8192 on CUDA, 1024 on a CPU)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds per median (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument(
        "--smoke", action="store_true", help="run with tiny inputs to check that the benchmark works"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
