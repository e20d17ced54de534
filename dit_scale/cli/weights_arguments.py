"""The arguments that describe weights, shared by the commands that read them, and the source they open."""

import argparse
from typing import TYPE_CHECKING

from dit_scale.cli.arguments import int_between

if TYPE_CHECKING:
    from dit_scale.config import ModelConfig
    from dit_scale.inference.sources import WeightsSource

SOURCE_HELP = "run folder, checkpoint folder, weights file, or folder of a diffusers pipeline"


def add_weights_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the arguments. The parser adds `source` itself."""
    group.add_argument(
        "--ema",
        default=None,
        help='EMA profile (default: the first of the run), or "raw" for the weights themselves',
    )
    group.add_argument("--vae", default=None, help="folder or hub name of the VAE (default: the run's)")
    bare = "of a bare weights file; other sources define it"
    group.add_argument("--model", default=None, help=f"model {bare} (default DiT-XL/2)")
    group.add_argument("--image-size", type=int_between(1), default=None, help=f"pixels {bare} (default 256)")
    group.add_argument(
        "--num-classes", type=int_between(1), default=None, help=f"classes {bare} (default 1000)"
    )
    group.add_argument(
        "--timestep-embedding",
        choices=("paper", "diffusers"),
        default=None,
        help="timestep frequencies of a bare weights file (default paper) or a diffusers pipeline\n"
        "(default diffusers, which computes what diffusers computes; weights converted from the\n"
        "paper's were trained with paper)",
    )


def open_weights(args: argparse.Namespace) -> "WeightsSource":
    """Open the source. Raises DitScaleError for what does not match."""
    from dit_scale.inference.sources import open_source

    return open_source(args.source, args.ema, _bare_model(args), args.timestep_embedding)


def _bare_model(args: argparse.Namespace) -> "ModelConfig | None":
    from dit_scale.config import ModelConfig

    chosen = {"name": args.model, "image_size": args.image_size, "num_classes": args.num_classes}
    given = {key: value for key, value in chosen.items() if value is not None}
    return ModelConfig.model_validate(given) if given else None
