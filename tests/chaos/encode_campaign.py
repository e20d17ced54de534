"""Kill encoding jobs at random dozens of times and compare their output with an undisturbed job.

    python -m tests.chaos.encode_campaign --kills 60 --seed 0 --out runs/chaos_encode

A job runs on a Ray cluster of two nodes and writes to a real S3 server (Ceph). Workers, drivers, the second
node and the complete cluster are killed with SIGKILL; the driver is restarted whenever it died. Exits with 1
when a byte differs, when an object was written twice, or when a job fails on its own. The report is in
OUT/report.md.
"""

import argparse
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from tests.support.encode_hunt import MANY, Grounds, Hunt, HuntError, grounds, hunt_at_random
from tests.support.faults.ceph import ceph_s3

KILLS_PER_JOB = 12

Say = Callable[[str], None]


@dataclass
class Result:
    """The results of the campaign."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    drivers: int = 0
    objects: int = 0
    """Objects compared with those of the undisturbed job."""
    problems: list[str] = field(default_factory=list)
    wall_s: float = 0.0

    def text(self) -> str:
        """Return the report as Markdown."""
        lines = [
            "# Random kills of encoding jobs",
            "",
            f"- {self.kills.total()} kills (SIGKILL) of {self.jobs} jobs in {self.wall_s / 60:.1f} min, "
            f"{self.drivers - self.jobs} restarts of the driver; seed {self.seed}",
            f"- {self.objects} objects compared byte for byte; each was written once",
            f"- verdict: {'FAILED' if self.problems else 'passed'}",
            *(f"- {problem}" for problem in self.problems),
            "",
            "| victim | kills |",
            "|---|---|",
            *(f"| {victim} | {count} |" for victim, count in self.kills.most_common()),
        ]
        return "\n".join(lines) + "\n"


def run(kills: int, seed: int, ground: Grounds, say: Say) -> Result:
    """Run jobs one after the other until the number of kills is reached; stop at the first problem."""
    result = Result(seed)
    begin_s = time.monotonic()
    draws = random.Random(seed)
    while result.kills.total() < kills and not result.problems:
        hunt = Hunt(ground, f"job{result.jobs}")
        result.jobs += 1
        try:
            hunt.start(*MANY)
            hunt_at_random(hunt, draws, min(KILLS_PER_JOB, kills - result.kills.total()))
            hunt.compare()
        except HuntError as error:
            result.problems.append(f"{hunt.name}: {error}")
        finally:
            hunt.close()
        result.kills += hunt.kills
        result.drivers += len(hunt.drivers)
        result.objects += len(hunt.seen)
        say(f"{hunt.name}: {dict(hunt.kills)}; {result.kills.total()} of {kills} kills")
    result.wall_s = time.monotonic() - begin_s
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="number of kills over all jobs (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of victims and pauses (default 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/chaos_encode"),
        help="output folder (default runs/chaos_encode)",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = (args.out / "files").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with ceph_s3() as ceph, grounds(folder, ceph) as ground:
            result = run(args.kills, args.seed, ground, Console(stderr=True).print)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    (args.out / "report.md").write_text(result.text())
    print(result.text())
    if not result.problems:
        shutil.rmtree(folder)
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
