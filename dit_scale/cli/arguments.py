"""What the commands share in reading their arguments; nothing of weight."""

import argparse
import math
import os.path
from collections.abc import Callable
from typing import Any

CONFIG_HELP = "a recipe (`dit-scale` lists their names) or a YAML file"


class Parser(argparse.ArgumentParser):
    """A parser that keeps the line about its command."""

    summary = ""


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,
    description: str = "",
    example: str = "",
) -> Parser:
    """The parser of a new command, which `run` carries out and ends with an exit code.

    `example` is a command line to show where `description` has none.
    """
    parser = _parser(commands, name, help, "\n\n  ".join(filter(None, [description or help, example])))
    parser.set_defaults(command=run, name=parser.prog)
    return parser


def add_group(commands: Any, name: str, help: str, example: str) -> Any:
    """The parsers of a new command's actions."""
    parser = _parser(commands, name, help, f"{help}\n\n  {example}")
    return parser.add_subparsers(title="actions", required=True, metavar="ACTION")


def _parser(commands: Any, name: str, help: str, description: str) -> Parser:
    parser: Parser = commands.add_parser(
        name, help=help, description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.summary = help
    return parser


def int_between(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Reads a whole number of this range."""

    def read(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return read


def finite_float(text: str) -> float:
    """Reads a number that is neither infinite nor nan."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def non_negative_float(text: str) -> float:
    """Reads a number, 0 or more."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """Reads a number above 0."""
    value = non_negative_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError("expected more than 0")
    return value


def output_path(text: str) -> str:
    """Reads a path to write to; a shell leaves the ~ of --out=~/x as it is."""
    return os.path.expanduser(text)


def weights_file(text: str) -> str:
    """Reads the name of a weights file to write."""
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .safetensors, got {text!r}")
    return output_path(text)
