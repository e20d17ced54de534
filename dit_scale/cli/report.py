"""`dit-scale report`: one HTML file that explains one run, or several side by side."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command, output_path
from dit_scale.cli.watching import WATCH_S

if TYPE_CHECKING:
    from dit_scale.report.page.contents import RunPage

MAX_RUNS = 16
"""Runs on one page: eight colours, with two kinds of lines."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "report",
        _report,
        "write one HTML file that explains a run, or several side by side",
        description="""\
Write one HTML file about a run, while it runs or afterwards: state and time left, all curves with the
restarts, failures by cause and node, where the time went, samples through time, score cards, configuration
and environment. Several runs share one page and its charts.

The file needs no network and has less than 2 MB: mail it, attach it, open it from a disk.""",
        example="dit-scale report runs/dit_xl2_256 --watch",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        type=output_path,
        help="file to write (default: RUN/report.html; report.html for several runs)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help=f"write it again every {WATCH_S:g} s until Ctrl-C; an open page follows",
    )


def _report(args: argparse.Namespace) -> int:
    from dit_scale.errors import ConfigError
    from dit_scale.report.page.contents import RunReader, names_of
    from dit_scale.storage.outputs import check_output

    if len(args.runs) > MAX_RUNS:
        raise ConfigError(
            f"got {len(args.runs)} runs, expected at most {MAX_RUNS} on one page; leave some out"
        )
    out = Path(args.out or (f"{args.runs[0]}/report.html" if len(args.runs) == 1 else "report.html"))
    readers = [RunReader(run, name) for run, name in zip(args.runs, names_of(args.runs), strict=True)]
    pages = [reader.read(time.time()) for reader in readers]
    check_output(out, ".html")
    if not args.watch:
        size = _write(out, pages, None)
        print(f"{out}: {', '.join(page.name for page in pages)}; {size / 1e6:.2f} MB")
        return 0
    print(f"{out} is written every {WATCH_S:g} s until Ctrl-C", flush=True)
    try:
        while True:
            _write(out, pages, WATCH_S)
            time.sleep(WATCH_S)
            pages = [reader.read(time.time()) for reader in readers]
    except KeyboardInterrupt:
        _write(out, pages, None)
        raise


def _write(out: Path, pages: "list[RunPage]", reload_s: float | None) -> int:
    """Write the page and return its size in bytes."""
    from dit_scale.report.page.document import document
    from dit_scale.storage.outputs import new_file

    html = document(pages, time.time(), reload_s).encode()
    with new_file(out) as temporary:
        temporary.write_bytes(html)
    return len(html)
