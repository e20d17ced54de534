"""`dit-scale sample`: draw images."""

import argparse
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command, finite_float, int_between, output_path

if TYPE_CHECKING:
    from dit_scale.config import ModelConfig


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "sample",
        _run,
        "draw images from a run, a checkpoint or a weights file",
        description="""Draw images and write grid.png and samples.npz.
Image i depends only on the weights, --seed, i and its class.

  dit-scale sample runs/dit_xl2_256 --images 16 --guidance 4
  dit-scale sample DiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema --classes 207,360""",
    )
    parser.add_argument("source", help="run folder, checkpoint folder, .safetensors or .pt file")
    # Not --num: the deepspeed launcher would read it as an abbreviation of its own --num_gpus.
    parser.add_argument("--images", type=int_between(1), default=16, help="number of images (default 16)")
    parser.add_argument(
        "--classes", type=_classes, help="comma-separated class numbers, used in turn (default: all)"
    )
    parser.add_argument(
        "--seed", type=int_between(0, 2**32 - 1), default=0, help="random seed of the noise (default 0)"
    )
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="sampler (default ddpm)")
    parser.add_argument("--steps", default="250", help='denoising steps, or "ddim50" (default 250)')
    parser.add_argument(
        "--guidance", type=finite_float, default=1.5, help="guidance scale (default 1.5); 1 disables guidance"
    )
    parser.add_argument(
        "--guidance-channels",
        choices=("first3", "all"),
        default="first3",
        help="latent channels to guide (default first3, as in the paper)",
    )
    parser.add_argument("--ema", default=None, help="EMA profile (default: the first of the run)")
    parser.add_argument("--vae", default=None, help="folder or hub name of the VAE (default: the run's)")
    _add_model_arguments(parser)
    parser.add_argument("--batch", type=int_between(1), default=32, help="images per batch (default 32)")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="fp32",
        help="precision of the transformer (default fp32)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto)")
    parser.add_argument(
        "--threads", type=int_between(1), default=1, help="CPU threads per process (default 1)"
    )
    parser.add_argument(
        "--out", type=output_path, default=None, help="output folder (default: RUN/samples or samples)"
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    bare = parser.add_argument_group("model of a bare weights file (other sources define their model)")
    bare.add_argument("--model", default=None, help="model (default DiT-XL/2)")
    bare.add_argument("--image-size", type=int_between(1), default=None, help="pixels (default 256)")
    bare.add_argument("--num-classes", type=int_between(1), default=None, help="(default 1000)")


def _run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dit_scale.config import EngineConfig
    from dit_scale.errors import ConfigError
    from dit_scale.inference.sample import sample
    from dit_scale.inference.sources import open_source
    from dit_scale.sampling.labels import balanced_labels
    from dit_scale.sampling.settings import SamplingSettings
    from dit_scale.storage.outputs import check_output

    is_folder = Path(args.source).is_dir()
    out = args.out or str(Path(args.source) / "samples" if is_folder else "samples")
    for name in ("grid.png", "samples.npz"):
        check_output(f"{out}/{name}")
    source = open_source(args.source, args.ema, _bare_model(args))
    vae_name = args.vae or source.vae
    if vae_name is None:
        raise ConfigError(f"{args.source} does not name its VAE; pass --vae FOLDER_OR_HUB_NAME")
    labels = balanced_labels(args.classes or range(source.model.num_classes), args.images)
    settings = SamplingSettings(
        seed=args.seed,
        steps=args.steps,
        method=args.sampler,
        guidance=args.guidance,
        guidance_channels=args.guidance_channels,
        tile=min(args.batch, args.images),
    )
    engine = EngineConfig(device=args.device, precision=args.precision, cpu_threads=args.threads)
    if sample(source, labels, settings, vae_name=vae_name, out=Path(out), engine=engine):
        print(f"{source.description}: {args.images} images in {out}/grid.png and {out}/samples.npz")
    return 0


def _bare_model(args: argparse.Namespace) -> "ModelConfig | None":
    from dit_scale.config import ModelConfig

    chosen = {"name": args.model, "image_size": args.image_size, "num_classes": args.num_classes}
    given = {key: value for key, value in chosen.items() if value is not None}
    return ModelConfig.model_validate(given) if given else None


def _classes(text: str) -> list[int]:
    return [int_between(0)(part.strip()) for part in text.split(",")]
