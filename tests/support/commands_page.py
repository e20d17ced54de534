"""docs/commands.md, made from the parser of the command line.

python -m tests.support.commands_page > docs/commands.md
"""

import argparse
from collections.abc import Iterator

from dit_scale import cli

HEAD = """\
# Commands

Every command and option, as `dit-scale COMMAND --help` explains them; a program writes this page.

Exit codes: 0 done, 1 failed, 2 a mistake that the message explains, 75 stopped on request and saved, 93 a
restart would fail the same way, 130 interrupted.

An unexpected error prints one line: what happened, where, and what to do. Its traceback is in `RUN/errors` if
the command works on a run; `DIT_SCALE_TRACEBACK=1` prints it as well. Please add it, and the output of
`dit-scale --version`, to a bug report.

The Tab key completes commands, options, recipes and keys once your shell has loaded the script of
[`dit-scale completion`](#dit-scale-completion).
"""


def page() -> str:
    """Return the whole page."""
    commands = cli._parser()[1]
    sections = [HEAD]
    for title, modules in cli.GROUPS.items():
        own = [name for name, parser in commands.items() if module_of(parser) in modules]
        sections += [f"## {title}\n", *(section(name, commands[name], "###") for name in own)]
    return "\n".join(sections)


def module_of(parser: argparse.ArgumentParser) -> object:
    """Return the module of `dit_scale.cli` that has declared a command."""
    return getattr(cli, str(parser.prog).rpartition(" ")[2])


def section(name: str, parser: argparse.ArgumentParser, heading: str) -> str:
    """Return the section of a command or an action, with its actions below."""
    lines = [f"{heading} dit-scale {name}\n", *description(str(parser.description)), *table(parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines += [section(f"{name} {own}", inner, f"{heading}#") for own, inner in action.choices.items()]
    return "\n".join(lines)


def description(text: str) -> Iterator[str]:
    """Yield the paragraphs of a description; indented lines become code."""
    for part in text.split("\n\n"):
        is_code = part.startswith("  ")
        yield "\n".join(f"  {line}" if is_code else line for line in part.splitlines()) + "\n"


def table(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield a table of the arguments."""
    rows = [action for action in parser._actions if action.dest not in ("help", argparse.SUPPRESS)]
    rows = [action for action in rows if not isinstance(action, argparse._SubParsersAction)]
    if rows:
        yield "| argument | |\n|---|---|"
        yield from (f"| `{argument(action)}` | {' '.join(str(action.help).split())} |" for action in rows)
        yield ""


def argument(action: argparse.Action) -> str:
    """Return an argument as it is written: `config`, `--world WORLD`, `--to {safetensors,pt}`."""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = choices or action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    return " ".join([*action.option_strings, *([str(value)] if action.nargs != 0 else [])])


if __name__ == "__main__":
    print(page(), end="")
