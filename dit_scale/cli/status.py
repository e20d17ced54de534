"""`dit-scale status`: what a run is doing, how often it restarted and why, where its time went."""

import argparse
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command

if TYPE_CHECKING:
    from dit_scale.report.status import Status

WATCH_S = 5.0
MAX_ROWS = 20
"""Interruptions shown; --json has all."""
MAX_TEXT = 160
"""Characters of a reason."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "status",
        _status,
        "what a run is doing, how often it restarted and why, where its time went",
        description="""Read what a run has written into its folder; works while it runs and after.

Whether it is alive is judged by the ages of its files. Where it keeps its checkpoints on S3, supervisors
that only wait for nodes give no sign in the folder.""",
        example="dit-scale status runs/dit_xl2_256 --watch",
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--json", action="store_true", help="one object, for machines")
    parser.add_argument("--watch", action="store_true", help=f"again every {WATCH_S:g} s, until Ctrl-C")


def _status(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from dit_scale.report.status import status_of

    while True:
        status = status_of(args.run, time.time())
        text = json.dumps(asdict(status), indent=None if args.watch else 2) if args.json else _text(status)
        print(text, flush=True)
        if not args.watch:
            return 0
        time.sleep(WATCH_S)
        if not args.json:
            print()


def _text(status: "Status") -> str:
    lines = [f"{status.run}: {status.state}, {status.text}"]
    speed = f"{status.steps_per_s:.3g} steps/s, " if status.steps_per_s else ""
    left = f"{_duration(status.eta_s)} left" if status.eta_s is not None else ""
    lines.append(f"  step        {status.step} of {status.steps or '?'}  {speed}{left}".rstrip(" ,"))
    age = f", {_duration(status.checkpoint_age_s)} old" if status.checkpoint_age_s is not None else ""
    lines.append(f"  checkpoint  {status.checkpoint or 'none yet'}{age}")
    nodes = ", ".join(status.nodes) or "no supervisor"
    lines.append(f"  attempt     {status.attempt}; round {status.round or '-'} ({nodes})")
    lines.append(f"  last sign   {_duration(status.silence_s)} ago")
    lines += ["", *_interruptions(status), "", *_ledger(status.spent_s, status.wall_s, status.goodput)]
    return "\n".join(lines)


def _interruptions(status: "Status") -> list[str]:
    found = status.interruptions
    if not found:
        return ["never interrupted"]
    lines = [f"interruptions: {len(found)}, {sum(one.lost_steps for one in found)} steps lost"]
    if len(found) > MAX_ROWS:
        lines[0] += f"; the last {MAX_ROWS}:"
    lines.append(f"  {'when (UTC)':<19}  {'reason':<9}  {'node':<12}  {'rank':>4}  {'step':>8}  {'lost':>6}")
    for one in found[-MAX_ROWS:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(one.at_s))
        rank = "-" if one.rank is None else one.rank
        step = "-" if one.step is None else one.step
        row = f"  {when}  {one.reason:<9}  {one.node or '-':<12}  {rank:>4}  {step:>8}  {one.lost_steps:>6}  "
        lines.append(row + (one.text.splitlines() or [""])[0][:MAX_TEXT])
    return lines


def _ledger(spent_s: Mapping[str, float], wall_s: float, goodput: float) -> list[str]:
    lines = [f"goodput {goodput:.1%} of {_duration(wall_s)}"]
    for name, seconds in spent_s.items():
        if seconds:
            lines.append(f"  {name:<12}  {seconds:>12.1f} s  {seconds / wall_s:>6.1%}")
    return lines


def _duration(seconds: float) -> str:
    """Two units of it: 3 d 4 h, 2 min 5 s."""
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (size, name), (smaller, small_name) in pairwise(units):
        if seconds >= size:
            return f"{seconds // size:.0f} {name} {seconds % size // smaller:.0f} {small_name}"
    return f"{seconds:.0f} s"
