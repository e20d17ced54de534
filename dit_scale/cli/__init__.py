"""The command line: `dit-scale COMMAND --help` tells the rest. Imports of weight happen inside commands."""

import argparse
import sys
from collections.abc import Callable

from dit_scale.cli import (
    checkpoint,
    ema,
    encode,
    latents,
    launch,
    models,
    plan,
    replay,
    sample,
    status,
    train,
)
from dit_scale.errors import DitScaleError

USER_ERROR_EXIT_CODE = 2


def main(argv: list[str] | None = None) -> int:
    """Run a command; mistakes that people can mend print one message and leave with code 2."""
    args = _parse(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except DitScaleError as error:
        print(f"{args.name}: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print(f"{args.name}: interrupted", file=sys.stderr)
        return 130


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments by name; key=value overrides may also stand behind options, where argparse sees none."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in args or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dit-scale", description="Train Diffusion Transformers, exactly resumable."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (encode, train, launch, plan, sample, models, latents, checkpoint, ema, replay, status):
        module.add(commands)
    return parser
