"""`dit-scale train`: train a model, or resume its training."""

import argparse
import gc
import sys
from typing import Any

from dit_scale.cli.arguments import CONFIG_HELP, command, int_between


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(
        commands,
        "train",
        _run,
        "train a model, or resume its training",
        description="""Train a model, or go on from the newest checkpoint of its run.

  dit-scale train dit_xl2_256 --dry-run --world 8
  dit-scale train dit_xl2_256 data.url=s3://bucket/imagenet256 run=runs/xl2
  deepspeed -q --num_gpus 8 --no_local_rank --module dit_scale.cli train dit_xl2_256

SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, SIGHUP (a closed terminal), Ctrl-C or Ctrl-\\: saves at the next step and
leaves with code 75; a second Ctrl-C or Ctrl-\\ ends it at once.""",
    )
    parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="for example optimizer.lr=2e-4 steps=1000; `dit-scale config` tells all keys",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, parameters, FLOPs and memory per device, and stop",
    )
    parser.add_argument(
        "--world", type=int_between(1), default=1, help="processes to plan for in --dry-run (default 1)"
    )


def _run(args: argparse.Namespace) -> int:
    from dit_scale.config import load_for_training

    config = load_for_training(args.config, args.overrides)
    if args.dry_run:
        from dit_scale.train import dry_run

        dry_run.report(config, args.world)
        return 0
    from dit_scale.elastic.node.exits import Exit
    from dit_scale.elastic.node.rank import is_second_hand, supervised

    def train() -> int:
        gc.disable()  # until the loop begins: what is imported and built on the way there stays
        from dit_scale.train import loop

        return loop.train(config)

    try:
        return supervised(train)
    except RuntimeError as error:
        if not is_second_hand(error):
            raise
        print(
            f"{args.name}: another rank is gone, and this one cannot go on without it; see what that rank "
            f"printed. The same command resumes from the newest checkpoint. ({error})",
            file=sys.stderr,
        )
        return Exit.FAILED
