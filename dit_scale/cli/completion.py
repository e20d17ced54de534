"""`dit-scale completion`: completion of commands, options, recipes and keys by the Tab key.

The shell runs this program at every Tab, so the script never goes out of date. What takes long to import is
imported only where keys are completed.
"""

import argparse
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dit_scale import recipes
from dit_scale.cli.arguments import Parser, add_command

if TYPE_CHECKING:
    from dit_scale.keys import Key

SHELLS = ("bash", "zsh")
VARIABLE = "_ARGCOMPLETE"
"""The script sets this environment variable to ask for completions."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "completion",
        _print,
        "print a script that makes the Tab key complete commands, options, recipes and keys",
        description="""\
Print a script for your shell, which completes commands, options, recipes and key=value settings. Load it in
~/.bashrc or ~/.zshrc (in zsh after `compinit`):

  source <(dit-scale completion bash)

or save it where bash looks for such scripts:

  dit-scale completion bash > ~/.local/share/bash-completion/completions/dit-scale""",
    )
    parser.add_argument("shell", choices=SHELLS, help="your shell")


def _print(args: argparse.Namespace) -> int:
    from argcomplete import shellcode

    print(shellcode(["dit-scale"], shell=args.shell))
    return 0


def complete_if_asked(parser: Parser, commands: Mapping[str, Parser]) -> None:
    """If the shell asks for completions, print them and exit the process."""
    if VARIABLE not in os.environ:
        return
    from argcomplete import autocomplete

    for name, command in commands.items():
        for action in command._actions:
            _attach(action, name)
    autocomplete(parser)


def _attach(action: Any, command: str) -> None:
    """Give an argument its completer; other arguments complete to their choices, or to files."""
    if action.dest == "config":
        action.completer = lambda prefix, **_: [*_recipes(command), *_files(prefix, "yaml", "yml")]
    elif action.dest == "overrides":
        action.completer = lambda prefix, **_: _settings(prefix, command)
    elif action.dest == "keys":
        action.completer = lambda prefix, **_: (key.key for key in _keys(command))


def _recipes(command: str) -> list[str]:
    """Return the recipes for a command: `encode_...` and `scaling_...` have their own."""
    special = [name for name in recipes.names() if name.startswith(("encode_", "scaling_"))]
    own = [name for name in special if name.startswith(f"{command}_")]
    return own or [name for name in recipes.names() if name not in special]


def _settings(prefix: str, command: str) -> Iterable[str]:
    """Return `key=` for every key; after `key=` its choices, files, or its default."""
    name, equals, value = prefix.partition("=")
    keys = {key.key.replace("[]", ".0"): key for key in _keys(command)}
    if not equals:
        return [f"{key}=" for key in keys]
    return [f"{name}={text}" for text in _values(keys[name], value)] if name in keys else []


def _values(key: "Key", begun: str) -> Iterable[str]:
    choices = key.type.split(" | ")
    if key.type == "bool":
        return ("true", "false")
    if len(choices) > 1 and not any(" " in choice for choice in choices):
        return choices
    return _files(begun) if key.type == "str" else [str(key.default)]


def _keys(command: str) -> "Iterable[Key]":
    """Return the keys of the configuration that a command reads."""
    from dit_scale.config import EncodeConfig, Section, TrainConfig
    from dit_scale.keys import groups
    from dit_scale.scaling.config import StudyConfig

    others: dict[str, type[Section]] = {"encode": EncodeConfig, "scaling": StudyConfig}
    return [key for group in groups(others.get(command, TrainConfig)) for key in group.keys]


def _files(prefix: str, *suffixes: str) -> Iterable[str]:
    from argcomplete.completers import FilesCompleter

    files: Iterable[str] = FilesCompleter(suffixes)(prefix)
    return files
