"""Mutation testing of the pure layers: small changes of a file that its tests must notice.

    make mutants
    python -m tests.mutants --seed 1

Leaves with 1 when fewer than 95 % are killed, the mutants of equivalent.txt not counted.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutants import equivalent, sample
from tests.mutants.sample import Mutant
from tests.mutants.trial import Bench, Trial, Verdict

ROOT = Path(__file__).parents[2]
COUNT = 100
"""Mutants in the sample."""
LEAST = 0.95
"""Share of the mutants that must be killed."""

KILLED, CUT_OFF, SURVIVED = "killed", "killed: the tests took too long", "survived"
EQUIVALENT, STALE = "survived, listed as equivalent", "killed, but listed as equivalent"
"""What can become of a mutant."""

TESTS = {
    "models/attention.py": "unit/test_attention unit/test_dit",
    "models/blocks.py": "unit/test_dit unit/test_zoo unit/test_weights",
    "models/dit.py": "unit/test_dit unit/test_zoo unit/test_weights",
    "models/embeddings.py": "unit/test_embeddings unit/test_dit",
    "models/table.py": "unit/test_zoo",
    "models/zoo.py": "unit/test_zoo unit/test_dit",
    "diffusion/gaussian.py": "unit/test_gaussian unit/test_loss unit/test_sampler",
    "diffusion/loss.py": "unit/test_loss unit/test_objective",
    "diffusion/sampler.py": "unit/test_sampler",
    "diffusion/schedule.py": "unit/test_schedule unit/test_gaussian unit/test_sampler",
    "data/order.py": "golden/test_formats unit/test_order property/test_order",
    "checkpoint/attempts.py": "unit/test_attempts unit/test_checkpoint unit/test_retention",
    "checkpoint/manifest.py": "golden/test_formats unit/test_checkpoint unit/test_attempts",
    "checkpoint/partition.py": "unit/test_checkpoint unit/test_saver",
    "checkpoint/rankfile.py": "golden/test_formats unit/test_checkpoint unit/test_saver",
    "checkpoint/reader.py": "golden/test_formats unit/test_checkpoint unit/test_retention",
    "checkpoint/retention.py": "unit/test_retention",
    "checkpoint/saver.py": "unit/test_saver unit/test_checkpoint",
    "checkpoint/writer.py": "unit/test_writer unit/test_checkpoint unit/test_retention unit/test_saver",
    "rng.py": "golden/test_formats unit/test_rng",
    "train/objective.py": "unit/test_objective",
}
"""A file of dit_scale => the tests that can see a change of it, those of the file itself first."""


def tests_of(file: str) -> tuple[str, ...]:
    """The test files that a mutant of this file, a path below the root, has to pass."""
    return tuple(f"tests/{name}.py" for name in TESTS[file.removeprefix("dit_scale/")].split())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="another sample (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side (default 2)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the copies go then too
    began_s = time.monotonic()
    mutants = sample.choose(ROOT, [f"dit_scale/{file}" for file in TESTS], COUNT, args.seed)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        bench = Bench(ROOT, Path(folder), args.jobs)
        seconds = durations(bench, sorted({file for mutant in mutants for file in tests_of(mutant.file)}))
        trials = [trial_of(mutant, seconds) for mutant in mutants]
        verdicts = run(bench, trials, f"mutants of seed {args.seed}")
    minutes = (time.monotonic() - began_s) / 60
    text, passed = report(mutants, verdicts, equivalent.read(equivalent.LIST.read_text()))
    print(f"{text}\nseed {args.seed}, {minutes:.1f} minutes")
    return 0 if passed else 1


def durations(bench: Bench, files: Sequence[str]) -> dict[str, float]:
    """Seconds that each test file takes without a mutant. Leaves with a message when one does not pass."""
    verdicts = run(bench, [Trial((file,), 600) for file in files], "unchanged")
    for file, verdict in zip(files, verdicts, strict=True):
        if verdict.exit_code != 0:
            sys.exit(f"{verdict.output}\n{file} does not pass without a mutant; mend that first")
    return {file: verdict.seconds for file, verdict in zip(files, verdicts, strict=True)}


def trial_of(mutant: Mutant, seconds: dict[str, float]) -> Trial:
    """The tests of a mutant, with several times the time that they take without it."""
    tests = tests_of(mutant.file)
    return Trial(tests, 30 + 5 * sum(seconds[file] for file in tests), mutant.file, mutant.source)


def run(bench: Bench, trials: Sequence[Trial], what: str) -> list[Verdict]:
    """The verdicts of all, in their order; shows how far it is."""
    verdicts: dict[int, Verdict] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Without a thread of its own: a lock that it holds would stay locked in a fork.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task(what, total=len(trials))
        for number, verdict in bench.run(trials):
            verdicts[number] = verdict
            progress.update(task, advance=1, refresh=True)
    return [verdicts[number] for number in range(len(trials))]


def report(
    mutants: Sequence[Mutant], verdicts: Sequence[Verdict], reasons: dict[equivalent.Name, str]
) -> tuple[str, bool]:
    """What happened, in words, and whether it is good enough."""
    lines: list[str] = []
    count = Counter[str]()
    for mutant, verdict in zip(mutants, verdicts, strict=True):
        word = fate(verdict, mutant.name in reasons)
        count[word] += 1
        if word != KILLED:
            lines += [f"{mutant.file}:{mutant.line}: {word}", mutant.text, ""]
    killed = count[KILLED] + count[CUT_OFF] + count[STALE]
    share = killed / max(killed + count[SURVIVED], 1)
    lines.append(
        f"{killed} killed ({count[CUT_OFF]} cut off), {count[SURVIVED]} survived, "
        f"{count[EQUIVALENT]} equivalent: {share:.1%}, expected {LEAST:.0%} or more"
    )
    if count[STALE]:
        lines.append("some that equivalent.txt lists are killed: take them out of it")
    return "\n".join(lines), share >= LEAST and not count[STALE]


def fate(verdict: Verdict, listed: bool) -> str:
    """What became of a mutant, in a word or two."""
    if verdict.exit_code == 0:
        return EQUIVALENT if listed else SURVIVED
    if listed:
        return STALE
    return CUT_OFF if verdict.exit_code is None else KILLED


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
