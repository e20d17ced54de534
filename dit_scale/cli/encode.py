"""`dit-scale encode`: encode images into a latent data set."""

import argparse
from typing import Any

from dit_scale.cli.arguments import CONFIG_HELP, OVERRIDES_HELP, add_command


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "encode",
        _run,
        "encode images into a latent data set, on this machine or a Ray cluster",
        description="""Encode images into a latent data set. Ray runs the work in parallel: on the cluster at
RAY_ADDRESS if it is set, otherwise on this machine. After any interruption, run the same command
again: finished shards are kept.

  dit-scale encode --config encode_imagenet_256 source=/data/imagenet/train output=s3://bucket/imagenet256
  dit-scale encode --config encode_imagenet_256 source=ILSVRC2012_img_train.tar --dry-run

`dit-scale config encode` explains the keys. Exit codes: 0 done, 2 an error that the last line
explains, 130 interrupted (Ctrl-C, SIGTERM, SIGHUP and similar).""",
    )
    parser.add_argument("--config", help=CONFIG_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and time one synthetic batch")


def _run(args: argparse.Namespace) -> int:
    from dit_scale.config import EncodeConfig, load
    from dit_scale_pipeline.job import is_submitted, run

    config = load(EncodeConfig, args.config, args.overrides, keep_relative=is_submitted())
    return run(config, args.dry_run)
