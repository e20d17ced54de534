"""The arguments that describe samples, shared by `sample` and `evaluate`, and the request they make."""

import argparse
from typing import TYPE_CHECKING

from dit_scale.choices import GUIDANCE_CHANNELS, METHODS, SPACINGS
from dit_scale.cli.arguments import finite_float, int_between
from dit_scale.cli.weights_arguments import add_weights_arguments, open_weights

if TYPE_CHECKING:
    from dit_scale.inference.bulk import SampleRequest, Worker


def add_sampling_arguments(parser: argparse.ArgumentParser, num_images: int) -> None:
    """Add the arguments, with `num_images` as the default of --images. The parser adds `source` itself."""
    # No option may be a prefix of several options of the deepspeed launcher, as --num is: it would refuse it.
    parser.add_argument(
        "--images", type=int_between(1), default=num_images, help=f"number of images (default {num_images})"
    )
    labels = parser.add_argument_group("classes")
    labels.add_argument(
        "--classes", type=_classes, help="comma-separated class numbers (default: all classes of the model)"
    )
    labels.add_argument(
        "--labels",
        choices=("random", "balanced"),
        default=None,
        help="draw the class of each image at random, as the paper does,\n"
        "or take the classes in turn (default: random; balanced with --classes)",
    )
    _add_sampler_arguments(parser.add_argument_group("sampler"))
    add_weights_arguments(parser.add_argument_group("weights"))
    _add_work_arguments(parser.add_argument_group("work"))


def sample_request(args: argparse.Namespace) -> "SampleRequest":
    """Open the weights and describe the samples. Raises DitScaleError for what does not match."""
    from dit_scale.config import EngineConfig
    from dit_scale.errors import ConfigError
    from dit_scale.inference.bulk import SampleRequest
    from dit_scale.inference.protocol import Decoding
    from dit_scale.sampling.labels import LabelChoice
    from dit_scale.sampling.settings import SamplingSettings

    source = open_weights(args)
    vae_name = args.vae or source.vae
    if vae_name is None:
        raise ConfigError(f"{args.source} does not name its VAE; pass --vae FOLDER_OR_HUB_NAME")
    drawn = args.labels or ("balanced" if args.classes else "random")
    return SampleRequest(
        source=source,
        vae=vae_name,
        num_images=args.images,
        labels=LabelChoice(drawn=drawn, classes=tuple(args.classes) if args.classes else None),
        settings=SamplingSettings(
            seed=args.seed,
            steps=args.steps,
            method=args.sampler,
            spacing=args.spacing,
            guidance=args.guidance,
            guidance_channels=args.guidance_channels,
            guidance_interval=args.guidance_interval,
            tile=args.tile,
        ),
        engine=EngineConfig(
            device=args.device,
            precision=args.precision,
            cpu_threads=args.threads,
            compile_blocks=args.compile,
        ),
        decoding=Decoding(precision=args.vae_precision, channels_last=args.vae_channels_last),
        batch=args.batch,
        overwrite=args.overwrite,
    )


def sampling_worker(args: argparse.Namespace) -> "Worker":
    """Return which share of the images this process computes."""
    from dit_scale.inference.bulk import Worker

    return Worker.from_environment(args.node, args.nodes)


def _add_sampler_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seed", type=int_between(0, 2**32 - 1), default=0, help="random seed of the noise (default 0)"
    )
    group.add_argument("--sampler", choices=METHODS, default="ddpm", help="sampler (default ddpm)")
    group.add_argument("--steps", default="250", help='denoising steps, or "ddim50" (default 250)')
    group.add_argument(
        "--spacing", choices=SPACINGS, default="uniform", help="how the steps are spread (default uniform)"
    )
    group.add_argument(
        "--guidance", type=finite_float, default=1.5, help="guidance scale (default 1.5); 1 disables guidance"
    )
    group.add_argument(
        "--guidance-channels",
        choices=GUIDANCE_CHANNELS,
        default="first3",
        help="latent channels to guide (default first3, as in the paper)",
    )
    group.add_argument(
        "--guidance-interval",
        type=_interval,
        default=None,
        metavar="LOW:HIGH",
        help="timesteps of the training diffusion to guide, inclusive (default: all)",
    )


def _add_work_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tile",
        type=int_between(1),
        default=32,
        help="images per forward pass (default 32); it affects the last bits of pixels",
    )
    group.add_argument(
        "--batch",
        type=int_between(1),
        default=None,
        help="images between two commits, rounded up to whole tiles\n(default: one tile); it affects no bit",
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="fp32",
        help="precision of the transformer (default fp32)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks; it affects the last bits of pixels",
    )
    group.add_argument(
        "--vae-precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="precision of the VAE's decoder (default fp32)",
    )
    group.add_argument(
        "--vae-channels-last",
        action="store_true",
        help="decode with channels-last tensors, faster with bf16 on a GPU",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device to compute on (default auto)",
    )
    group.add_argument(
        "--threads", type=int_between(1), default=1, help="CPU threads per process (default 1)"
    )
    group.add_argument(
        "--nodes", type=int_between(1), default=1, help="nodes that work independently (default 1)"
    )
    group.add_argument(
        "--node", type=int_between(0), default=0, help="number of this node, from 0 (default 0)"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace samples of another protocol in the folder"
    )


def _classes(text: str) -> list[int]:
    return [int_between(0)(part.strip()) for part in text.split(",")]


def _interval(text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    if not (colon and low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
        raise argparse.ArgumentTypeError(f"expected LOW:HIGH, for example 200:800, got {text!r}")
    return int(low), int(high)
