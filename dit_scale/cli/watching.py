"""Reports for a person or, with --json, for a program: once, or with --watch until Ctrl-C."""

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from dit_scale.cli.tables import new_screen

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WATCH_S = 5.0

Report = TypeVar("Report", bound="DataclassInstance")


def add_watching(parser: argparse.ArgumentParser, json_help: str) -> None:
    """Declare --json and --watch."""
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument("--watch", action="store_true", help=f"repeat every {WATCH_S:g} s until Ctrl-C")


def show_report(args: argparse.Namespace, read: Callable[[], Report], show: Callable[[Report], None]) -> int:
    """Read a report and show it, again and again with --watch; with --json, print it as one object."""
    import json
    from dataclasses import asdict

    while True:
        report = read()
        if args.json:
            print(json.dumps(asdict(report), indent=None if args.watch else 2), flush=True)
        else:
            if args.watch:
                new_screen()
            show(report)
        if not args.watch:
            return 0
        time.sleep(WATCH_S)
