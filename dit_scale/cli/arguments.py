"""What the commands share in reading their arguments; nothing of weight."""

import argparse
from collections.abc import Callable
from typing import Any


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, **more: Any
) -> Any:
    """The parser of a new command, which `run` carries out and ends with an exit code."""
    parser = commands.add_parser(
        name,
        help=help,
        description=more.pop("description", help),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.set_defaults(command=run, name=parser.prog)
    return parser


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Reads a whole number of this range."""

    def read(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return read


def weights_file(text: str) -> str:
    """Reads the name of a weights file to write."""
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .safetensors, got {text!r}")
    return text
