"""Disturb runs from outside for an hour, with the public commands alone, and compare their results.

    python -m tests.chaos.outside --minutes 60 --seed 0 --out runs/outside

Runs of 1, 2 and 3 processes at ZeRO-1, 2 and 3 are killed, run out of disk space, have one bit of a file
flipped, or meet stale processes that resume. Afterwards a run must have the record and the last checkpoint of
an undisturbed run, or report what is wrong without a traceback. Exits with 1 when one does not. The report is
in OUT/report.md.
"""

import argparse
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.disturbances import DISTURBANCES, OF_DATA, Happened
from tests.support.faults.small_disk import small_disk
from tests.support.latents import write_latents
from tests.support.ranks import jobs
from tests.support.ranks.public_run import PublicRun, RunError, Shape, record_lines
from tests.support.ranks.runs import final_files

SHAPES = tuple(Shape(world, stage) for world in (1, 2, 3) for stage in (1, 2, 3))
STEPS, EVERY_STEPS = 60, 4
DISK_BYTES = 3 * 2**29
"""A little more than the preflight of a launch requires."""


@dataclass(frozen=True)
class Trial:
    """One run and its result."""

    number: int
    kind: str
    shape: Shape
    what: str
    outcome: str
    problem: str = ""


@dataclass
class Campaign:
    """All trials so far, and the results of the undisturbed runs."""

    folder: Path
    seed: int
    trials: list[Trial] = field(default_factory=list)
    wall_s: float = 0.0
    _expected: dict[Shape, tuple[list[dict[str, object]], list[bytes]]] = field(default_factory=dict)

    def expected(self, shape: Shape) -> tuple[list[dict[str, object]], list[bytes]]:
        """Return the record and the last checkpoint of an undisturbed run of this shape."""
        if shape not in self._expected:
            run = new_run(self.folder / "straight", shape)
            try:
                if any(codes := run.start("ranks").wait()):
                    raise RunError(f"the undisturbed run exited with {codes}:\n{run.text()[-3000:]}")
                self._expected[shape] = record_lines(run), final_files(run.config)
            finally:
                run.end_all()
            shutil.rmtree(self.folder / "straight")
        return self._expected[shape]

    def try_one(self, number: int) -> Trial:
        """Disturb one run; the seed and the number choose the way and the moments."""
        draws = random.Random(f"{self.seed}/{number}")
        kind = list(DISTURBANCES)[number % len(DISTURBANCES)]
        shape = draws.choice(SHAPES)
        expected = self.expected(shape)
        with small_disk(self.folder / f"trial-{number:04d}", DISK_BYTES) as disk:
            run = new_run(disk, shape)
            happened = Happened("", "")
            try:
                happened = DISTURBANCES[kind](run, draws)
                problem = differences(run, happened, *expected)
            except RunError as error:
                problem = str(error)
            finally:
                run.end_all()
            if problem:
                shutil.copytree(disk, self.folder / f"problem-{number:04d}")
        (self.folder / f"trial-{number:04d}").rmdir()
        trial = Trial(number, kind, shape, what=happened.what, outcome=happened.outcome, problem=problem)
        self.trials.append(trial)
        return trial

    def text(self) -> str:
        """Return the report as Markdown."""
        bad = [trial for trial in self.trials if trial.problem]
        counts = Counter((trial.kind, trial.shape.world, trial.shape.stage) for trial in self.trials)
        lines = [
            "# Runs disturbed from outside",
            "",
            f"- {len(self.trials)} runs in {self.wall_s / 60:.0f} min, seed {self.seed}; {len(bad)} problems",
            "",
            "| disturbance | runs | " + " | ".join(map(str, SHAPES)) + " | problems |",
            "|---|---|" + "---|" * len(SHAPES) + "---|",
        ]
        for kind in DISTURBANCES:
            of_kind = [trial for trial in self.trials if trial.kind == kind]
            cells = [counts[kind, shape.world, shape.stage] for shape in SHAPES]
            wrong = sum(bool(trial.problem) for trial in of_kind)
            lines.append(f"| {kind} | {len(of_kind)} | {' | '.join(map(str, cells))} | {wrong} |")
        lines += ["", "| run | shape | disturbance | result |", "|---|---|---|---|"]
        for trial in self.trials:
            outcome = f"PROBLEM: {trial.problem.splitlines()[0]}" if trial.problem else trial.outcome
            lines.append(f"| {trial.number} | {trial.shape} | {trial.what or trial.kind} | {outcome} |")
        return "\n".join(lines) + "\n"


def new_run(folder: Path, shape: Shape) -> PublicRun:
    """Return a run below this folder with a data set of its own."""
    write_latents(folder / OF_DATA, num=40)
    config = jobs.small_config(folder / "run", folder / OF_DATA, zero_stage=shape.stage)
    knobs = {"every_steps": EVERY_STEPS, "ema_every_steps": 2 * EVERY_STEPS, "keep": 2, "deadline_s": 120.0}
    return PublicRun(jobs.saving(config, STEPS, **knobs), shape)


def differences(
    run: PublicRun, happened: Happened, record: list[dict[str, object]], files: list[bytes]
) -> str:
    """Return what is wrong; empty if nothing is."""
    # A damaged line of the record may be left out; this is reported.
    if not _is_record(happened):
        got = record_lines(run)
        if got != record:
            return f"the record has {len(got)} lines; {_same(got, record)} of them are as expected"
    if final_files(run.config) != files:
        return "the last checkpoint differs"
    text = run.text()
    return f"a traceback:\n{text[text.index('Traceback') :][:3000]}" if "Traceback" in text else ""


def _is_record(happened: Happened) -> bool:
    path = happened.changed
    return path is not None and (path.name == "metrics.jsonl" or path.match("records/*.jsonl"))


def _same(got: list[dict[str, object]], wanted: list[dict[str, object]]) -> int:
    return sum(line in wanted for line in got)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="duration (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial (default 0)")
    parser.add_argument("--kind", choices=DISTURBANCES, help="run one kind only (default all)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/outside"), help="output folder (default runs/outside)"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    campaign, begin_s, number = Campaign(args.out, args.seed), time.monotonic(), args.first
    while (elapsed_s := time.monotonic() - begin_s) < 60 * args.minutes:
        if args.kind in (None, list(DISTURBANCES)[number % len(DISTURBANCES)]):
            trial = campaign.try_one(number)
            told = trial.problem or trial.outcome
            print(
                f"{elapsed_s / 60:5.1f} min  {number:>4}  {trial.kind}, {trial.shape}: {trial.what}: {told}",
                flush=True,
            )
        number += 1
        campaign.wall_s = time.monotonic() - begin_s
        (args.out / "report.md").write_text(campaign.text())
    print(campaign.text())
    return 1 if any(trial.problem for trial in campaign.trials) else 0


if __name__ == "__main__":
    sys.exit(main())
