"""Measure quality against steps: sample a trained model with every sampler, spacing and number of steps.

    python -m benchmarks.solvers runs/demo/run --images 2000
    python -m benchmarks.solvers runs/demo/run --cases ddpm:250:uniform,dpmpp_2m:20:logsnr

It prints the Frechet distance to the run's own training images, and the share of samples that the feature
network recognises as the requested class. The training images are the latents as the VAE decodes them, so
the distance contains no error of the VAE. All cases start from the same noise and have the same balanced
classes.

The images are ten blocks. The standard error of the distance is a jackknife over the blocks, that of the
share is binomial. A "=" marks a figure that is not worse than that of 250 steps of DDPM by more than one
standard error of the difference. Each block is a file in --out, so an interrupted run continues.

Shapes: B images of a block, F features.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.train_step import cpu_name, versions
from dit_scale import vae, weights
from dit_scale.config import TrainConfig, load
from dit_scale.errors import ConfigError, DitScaleError
from dit_scale.evaluate.features import FeatureNetwork
from dit_scale.evaluate.frechet import frechet_with_error
from dit_scale.evaluate.images import TILE, open_images
from dit_scale.evaluate.moments import Moments
from dit_scale.evaluate.networks import load_network
from dit_scale.inference.sources import WeightsSource, build_model, open_source
from dit_scale.models.dit import DiT
from dit_scale.sampling.denoise import sample_tile, sampling_schedule
from dit_scale.sampling.labels import balanced_labels
from dit_scale.sampling.settings import SamplingSettings
from dit_scale.storage.outputs import new_file

BLOCKS = 10
STANDARD = "ddpm:250:uniform"
CASES = (
    STANDARD,
    *(f"ddpm:{steps}:uniform" for steps in (100, 50)),
    *(f"ddim:{steps}:uniform" for steps in (50, 20, 10)),
    *(f"{method}:{steps}:uniform" for method in ("dpmpp_2m", "unipc") for steps in (50, 20, 10, 5)),
    *(f"dpmpp_2m_sde:{steps}:logsnr" for steps in (50, 20, 10)),
    *(f"dpmpp_2m:{steps}:{spacing}" for steps in (20, 10, 5) for spacing in ("quadratic", "logsnr")),
    *(f"unipc:{steps}:{spacing}" for steps in (20, 10, 5) for spacing in ("quadratic", "logsnr")),
)
"""method:steps:spacing."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all cases share."""

    source: WeightsSource
    model: DiT
    decoder: vae.Vae
    network: FeatureNetwork
    labels: list[int]
    guidance: float
    out: Path

    @property
    def block(self) -> int:
        """Images per block."""
        return len(self.labels) // BLOCKS


def main() -> int:
    """Measure all requested cases and print them. Returns 2 for bad input."""
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    try:
        bench = _bench(args)
        reference = _reference(args.run, bench)
        rows = []
        for case in args.cases.split(","):
            rows.append(_row(case, bench, reference))
            if args.json:
                print(json.dumps(rows[-1]), flush=True)
    except DitScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    compare(rows)
    Console(stderr=args.json, soft_wrap=True).print(_table(rows, bench))
    return 0


def _bench(args: argparse.Namespace) -> Bench:
    if args.images % BLOCKS or args.images < 2 * BLOCKS:
        raise ConfigError(f"--images {args.images}: expected a multiple of {BLOCKS} blocks, 20 or more")
    source = open_source(args.run)
    decoder = vae.load(source.vae or "")
    decoder.require_weights(source.vae_sha256)
    return Bench(
        source=source,
        model=build_model(source, torch.device("cpu"), torch.float32),
        decoder=decoder,
        network=load_network(args.network),
        labels=balanced_labels(range(source.model.num_classes), args.images).tolist(),
        guidance=args.guidance,
        out=args.out,
    )


def _reference(run: str, bench: Bench) -> Moments:
    """Moments of the run's training images, decoded."""
    data = load(TrainConfig, f"{run}/config.yaml").data
    images = open_images(f"latents:{data.url}", device=torch.device("cpu"), vae=data.vae)
    tiles = [range(start, min(start + TILE, images.count)) for start in range(0, images.count, TILE)]
    with torch.no_grad():
        pools = [bench.network(torch.from_numpy(images.read(tile))).pool_NF.numpy() for tile in tiles]
    return Moments.of(np.concatenate(pools))


def _row(case: str, bench: Bench, reference: Moments) -> Row:
    method, steps, spacing = case.split(":")
    settings = settings_of(case, bench.guidance, bench.block)
    folder = bench.out / f"{method}-{steps}-{spacing}-{_key(settings, bench)}"
    numbers = track(
        range(BLOCKS), case, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )
    blocks = [_block(number, settings, bench, folder / f"{number}.npz") for number in numbers]
    distance = frechet_with_error([Moments.of(block["pool_BF"]) for block in blocks], reference)
    share = float(np.mean([block["recognised_B"] for block in blocks]))
    num_images = len(bench.labels)
    return {
        "method": method,
        "steps": int(steps),
        "spacing": spacing,
        "images": num_images,
        "frechet": distance.value,
        "frechet_error": distance.standard_error,
        "recognised": share,
        "recognised_error": math.sqrt(share * (1 - share) / num_images),
        "ms_per_image": float(np.median([block["seconds"] for block in blocks])) / bench.block * 1e3,
    }


def settings_of(case: str, guidance: float, block: int) -> SamplingSettings:
    """Return the settings of a case METHOD:STEPS:SPACING; a block is a tile."""
    method, steps, spacing = case.split(":")
    return SamplingSettings(
        method=method,  # type: ignore[arg-type]  # SamplingSettings checks it
        steps=steps,
        spacing=spacing,  # type: ignore[arg-type]
        guidance=guidance,
        tile=block,
    )


def _key(settings: SamplingSettings, bench: Bench) -> str:
    """Return a digest of everything that the files of a case depend on."""
    parts = [
        asdict(settings),
        asdict(bench.network.identity),
        weights.digest(bench.source.state, {}),
        bench.decoder.identity().weights_sha256,
        len(bench.labels),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _block(number: int, settings: SamplingSettings, bench: Bench, path: Path) -> dict[str, np.ndarray]:
    """Sample one block of images, or read what an earlier run found of it."""
    if not path.exists():
        images = range(number * bench.block, (number + 1) * bench.block)
        schedule = sampling_schedule(bench.source.timesteps, settings, "cpu")
        started = time.perf_counter()
        images_BHW3 = sample_tile(
            bench.model,
            bench.decoder,
            schedule,
            labels=bench.labels,
            images=images,
            settings=settings,
        )
        seconds = time.perf_counter() - started
        with torch.no_grad():
            features = bench.network(images_BHW3)
        if features.probabilities_NC is None:
            raise ConfigError(f"{bench.network.identity.name} has no classes; expected a classifier")
        recognised_B = features.probabilities_NC.argmax(1).numpy() == np.asarray(bench.labels)[images]
        with new_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, pool_BF=features.pool_NF.numpy(), recognised_B=recognised_B, seconds=seconds)
    with np.load(path) as arrays:
        return dict(arrays)


def compare(rows: list[Row]) -> None:
    """Add to each row whether it is as good as the standard, if that was measured."""
    found = [row for row in rows if f"{row['method']}:{row['steps']}:{row['spacing']}" == STANDARD]
    for row in rows if found else []:
        excess = row["frechet"] - found[0]["frechet"]
        lack = found[0]["recognised"] - row["recognised"]
        row["frechet_equal"] = excess <= math.hypot(row["frechet_error"], found[0]["frechet_error"])
        row["recognised_equal"] = lack <= math.hypot(row["recognised_error"], found[0]["recognised_error"])


def _table(rows: list[Row], bench: Bench) -> Table:
    table = Table(
        title=f"{bench.source.model.name}, {len(bench.labels)} images, guidance {bench.guidance}",
        caption=f"{cpu_name()}\n{' '.join(f'{name} {v}' for name, v in versions().items())}\n"
        f"{bench.network.identity.name} {bench.network.identity.weights_sha256[:12]}; "
        f"weights: {bench.source.description}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("sampler")
    table.add_column("spacing")
    for column in ("steps", "Frechet distance", "recognised", "ms/image"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["method"],
            row["spacing"],
            str(row["steps"]),
            f"{row['frechet']:.2f} +- {row['frechet_error']:.2f}{_mark(row, 'frechet_equal')}",
            f"{row['recognised']:.2%} +- {row['recognised_error']:.2%}{_mark(row, 'recognised_equal')}",
            f"{row['ms_per_image']:.1f}",
        )
    return table


def _mark(row: Row, name: str) -> str:
    return " =" if row.get(name) else "  "


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument("--images", type=int, default=2000, help="images per case (default 2000)")
    parser.add_argument("--cases", default=",".join(CASES), help="METHOD:STEPS:SPACING,... (default: all)")
    parser.add_argument("--guidance", type=float, default=1.5, help="guidance scale (default 1.5)")
    parser.add_argument("--network", default="classifier:demo/classifier.safetensors", help="KIND:PATH")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/solvers"), help="folder for features (default runs/solvers)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
