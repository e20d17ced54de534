"""Argument types and command builders that the commands share. Imports nothing heavy."""

import argparse
import math
import os.path
import re
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

USER_ERROR_EXIT_CODE = 2
"""Exit code for a mistake of the user; also that of argparse."""
MAX_WIDTH = 100
"""Characters of a line of help; longer lines are hard to read."""
CONFIG_HELP = "a recipe (`dit-scale` lists them) or a YAML file"

OVERRIDES_HELP = "override keys of the configuration"


class Formatter(argparse.HelpFormatter):
    """Wraps help to the terminal, at most MAX_WIDTH; indented lines of a description stay as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=help_width())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(
            part if re.search(r"^  ", part, re.MULTILINE) else textwrap.fill(part, width) for part in parts
        )


def help_width() -> int:
    """Return the width of help in characters."""
    return min(shutil.get_terminal_size().columns - 2, MAX_WIDTH)


class Parser(argparse.ArgumentParser):
    """A parser that keeps the one-line summary of its command."""

    summary = ""


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,
    *,
    description: str = "",
    example: str = "",
) -> Parser:
    """Add a command that `run` executes and return its parser; `run` returns the exit code.

    `description` defaults to `help`. `example` is a command line to show after it.
    """
    text = "\n\n  ".join(filter(None, [description or _sentence(help), example]))
    parser = _add_parser(commands, name, help, text)
    parser.set_defaults(command=run, name=parser.prog)
    return parser


def add_group(commands: Any, name: str, help: str, example: str) -> Any:
    """Add a command that has actions and return the object to which they are added."""
    parser = _add_parser(commands, name, help, f"{_sentence(help)}\n\n  {example}")
    return parser.add_subparsers(title="actions", required=True, metavar="ACTION")


def _add_parser(commands: Any, name: str, help: str, description: str) -> Parser:
    parser: Parser = commands.add_parser(name, help=help, description=description, formatter_class=Formatter)
    parser.summary = help
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def int_between(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a parser of integers from `low` to `high`."""

    def read(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text!r}")
        return int(text)

    return read


def finite_float(text: str) -> float:
    """Parse a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def non_negative_float(text: str) -> float:
    """Parse a finite number >= 0."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """Parse a finite number > 0."""
    value = non_negative_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def output_path(text: str) -> str:
    """Parse a path to write to; a shell does not expand the ~ of --out=~/x."""
    return os.path.expanduser(text)


def weights_file(text: str) -> str:
    """Parse the path of a weights file to write."""
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"expected a path that ends in .safetensors, got {text!r}")
    return output_path(text)
