"""`dit-scale train`: train a model, or resume a run."""

import argparse
import gc
from typing import Any

from dit_scale.cli.arguments import CONFIG_HELP, OVERRIDES_HELP, add_command, int_between


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "train",
        _run,
        "train a model, or resume a run",
        description="""Train a model, or resume a run from its newest checkpoint.

  dit-scale train dit_xl2_256 --dry-run --world 8
  dit-scale train dit_xl2_256 data.url=s3://bucket/imagenet256 run=runs/xl2
  deepspeed -q --num_gpus 8 --no_local_rank --module dit_scale.cli train dit_xl2_256

On SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, SIGHUP (a closed terminal), Ctrl-C or Ctrl-\\ it saves at the
next step and exits with code 75. A second Ctrl-C or Ctrl-\\ exits immediately.""",
    )
    parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"{OVERRIDES_HELP}, for example optimizer.lr=2e-4 steps=1000; `dit-scale config` lists them",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, parameters, FLOPs and memory per device, then exit",
    )
    parser.add_argument(
        "--world", type=int_between(1), default=1, help="world size that --dry-run plans for (default 1)"
    )


def _run(args: argparse.Namespace) -> int:
    from dit_scale.config import load_for_training

    config = load_for_training(args.config, args.overrides)
    if args.dry_run:
        from dit_scale.train import dry_run

        dry_run.report(config, args.world)
        return 0
    from dit_scale.elastic.node.rank import supervised

    args.run_folder = config.run

    def train() -> int:
        gc.disable()  # until the loop starts: objects created before it are never freed
        from dit_scale.train import loop

        return loop.train(config)

    return supervised(train)
