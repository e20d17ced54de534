"""`dit-scale sample`: draw images."""

import argparse
from typing import Any

from dit_scale.cli.arguments import add_command, finite_float, int_between, output_path


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "sample",
        _run,
        "draw images from a run, a checkpoint or a weights file",
        description="""Draw images; writes grid.png and samples.npz.
Image i depends on the weights, --seed, i and its class alone.

  dit-scale sample runs/dit_xl2_256 --images 16 --guidance 4
  dit-scale sample DiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema --classes 207,360""",
    )
    parser.add_argument("source", help="run folder, checkpoint folder, .safetensors or .pt file")
    # not --num: the deepspeed launcher takes that for an abbreviation of its own --num_gpus
    parser.add_argument("--images", type=int_between(1), default=16, help="images (default 16)")
    parser.add_argument(
        "--classes", type=_classes, help="comma list of class numbers, in turn (default: all)"
    )
    parser.add_argument(
        "--seed", type=int_between(0, 2**32 - 1), default=0, help="key of all noise (default 0)"
    )
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="default ddpm")
    parser.add_argument("--steps", default="250", help='denoising steps, or "ddim50" (default 250)')
    parser.add_argument(
        "--guidance", type=finite_float, default=1.5, help="classifier-free guidance scale; 1 is off"
    )
    parser.add_argument(
        "--guidance-channels",
        choices=("first3", "all"),
        default="first3",
        help="the paper guides the first 3 of 4",
    )
    parser.add_argument("--ema", default=None, help="EMA profile (default: the first of the run)")
    parser.add_argument("--vae", default=None, help="folder or hub name (default: the run's data.vae)")
    parser.add_argument("--model", default=None, help="of a bare weights file, for example DiT-XL/2")
    parser.add_argument(
        "--image-size", type=int_between(1), default=256, help="of a bare weights file (default 256)"
    )
    parser.add_argument(
        "--num-classes", type=int_between(1), default=1000, help="of a bare weights file (default 1000)"
    )
    parser.add_argument("--batch", type=int_between(1), default=32, help="images at once (default 32)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="fp32", help="of the transformer"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--threads", type=int_between(1), default=1, help="CPU threads of each process (default 1)"
    )
    parser.add_argument(
        "--out", type=output_path, default=None, help="folder (default: RUN/samples or samples)"
    )


def _run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dit_scale.config import EngineConfig, ModelConfig
    from dit_scale.errors import ConfigError
    from dit_scale.inference.sample import SamplingSettings, balanced_labels, sample
    from dit_scale.inference.sources import open_source
    from dit_scale.storage.outputs import check_output

    here = Path(args.source)
    out = args.out or str(here / "samples" if here.is_dir() else "samples")
    for name in ("grid.png", "samples.npz"):
        check_output(f"{out}/{name}")
    bare = None
    if args.model:
        bare = ModelConfig(name=args.model, image_size=args.image_size, num_classes=args.num_classes)
    source = open_source(args.source, args.ema, bare)
    vae = args.vae or source.vae
    if vae is None:
        raise ConfigError("a weights file does not name its VAE: pass --vae FOLDER_OR_HUB_NAME")
    labels = balanced_labels(args.classes or range(source.model.num_classes), args.images)
    settings = SamplingSettings(
        args.seed,
        args.steps,
        args.sampler,
        args.guidance,
        args.guidance_channels,
        min(args.batch, args.images),
    )
    engine = EngineConfig(device=args.device, precision=args.precision, cpu_threads=args.threads)
    if sample(source, vae, labels, settings, Path(out), engine):
        print(f"{source.description}: {args.images} images in {out}/grid.png and {out}/samples.npz")
    return 0


def _classes(text: str) -> list[int]:
    return [int_between(0)(part.strip()) for part in text.split(",")]
