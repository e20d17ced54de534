"""The command line: `dit-scale` lists the commands, `dit-scale COMMAND --help` explains one.

Commands import heavy libraries when they run, so help is quick.
"""

import argparse
import difflib
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence

from dit_scale import host_memory, recipes, signals
from dit_scale.cli import (
    checkpoint,
    compare,
    completion,
    config,
    ema,
    encode,
    evaluate,
    export,
    latents,
    launch,
    models,
    plan,
    replay,
    report,
    runs,
    sample,
    scaling,
    status,
    train,
)
from dit_scale.cli.arguments import USER_ERROR_EXIT_CODE as USER_ERROR_EXIT_CODE
from dit_scale.cli.arguments import Formatter, Parser, help_width
from dit_scale.cli.streams import LostOutputError, guarded, run_as_job
from dit_scale.heartbeat import FOLDER_VARIABLE

JOBS = ("dit-scale train", "dit-scale launch", "dit-scale encode", "dit-scale sample", "dit-scale scaling")
"""Commands that continue when their output cannot be written."""
INTERRUPTED = ("dit-scale encode", "dit-scale sample")
"""Jobs that any signal interrupts like Ctrl-C: what they have committed stays."""
GROUPS = {
    "Plan a run": (config, models, plan),
    "Images to latents": (encode, latents),
    "Train": (train, launch, runs, status, compare, report, replay, scaling),
    "Use a trained model": (sample, evaluate, export, checkpoint, ema),
    "Set up": (completion,),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    An error prints one line: see dit_scale.cli.failures. Without `argv`, run the command line of this process
    and replace its standard streams.
    """
    if argv is None:
        return guarded(lambda: _run(sys.argv[1:], _begin_job))
    return _run(argv)


def _begin_job(name: str) -> None:
    """Set up signals and streams of a job before the slow imports."""
    run_as_job()
    if name in INTERRUPTED:
        signals.interrupt()
    elif FOLDER_VARIABLE not in os.environ:  # a supervised rank leaves signals to its supervisor
        signals.leave_until_ready(f"{name}: stopped before the first step, nothing to save")


def _run(argv: list[str], begin_job: Callable[[str], None] = lambda name: None) -> int:
    args = _parse(argv or ["--help"])
    host_memory.use_huge_pages()  # before any command makes a tensor
    if args.name in JOBS and not getattr(args, "dry_run", False):
        begin_job(args.name)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except LostOutputError:
        raise
    except Exception as error:
        from dit_scale.cli.failures import report

        return report(error, args)
    except KeyboardInterrupt:
        print(f"{args.name}: interrupted", file=sys.stderr)
        return 130


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; key=value overrides may follow options, where argparse does not accept them."""
    parser, commands = _parser()
    completion.complete_if_asked(parser, commands)
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ";"
        parser.error(f"unknown command {argv[0]!r}{guess} `dit-scale` alone lists the commands")
    args, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in args or any(text.startswith("-") for text in rest)):
        settings = [text.lstrip("-") for text in rest if "overrides" in args and "=" in text]
        hint = f"; settings have no dashes: {' '.join(settings)}" if settings else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        args.overrides += rest
    return args


class _PrintVersions(argparse.Action):
    """Prints the versions of everything that matters and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from dit_scale.cli.versions import version_report

        print(version_report())
        parser.exit()


def _parser() -> tuple[Parser, Mapping[str, Parser]]:
    """Return the parser of the command line and the parsers of its commands by name."""
    parser = Parser(
        prog="dit-scale",
        usage="dit-scale COMMAND ...",
        formatter_class=Formatter,
        epilog="`dit-scale COMMAND --help` explains a command and shows an example.",
    )
    parser.add_argument("--version", action=_PrintVersions, nargs=0, help="print versions, for a bug report")
    commands = parser.add_subparsers(
        prog=parser.prog, required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    lines = ["Train Diffusion Transformers on any number of nodes, exactly resumable."]
    for title, modules in GROUPS.items():
        before = set(commands.choices)
        for module in modules:
            module.add(commands)
        lines += ["", f"{title}:"]
        for name, command in commands.choices.items():
            if name not in before:
                lines += _wrapped(command.summary, f"  {name:<12}")
    lines += ["", "Recipes (pass the name as the configuration):"]
    lines += _wrapped(" ".join(recipes.names()), "  ")
    parser.description = "\n".join(lines)
    return parser, commands.choices


def _wrapped(text: str, start: str) -> list[str]:
    return textwrap.wrap(
        text, help_width(), initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    )
