"""Mutation testing of the pure layers: apply small changes to a file that its tests must detect.

    make mutants
    python -m tests.mutants --seed 1

Exits with 1 if fewer than 95 % of the mutants are killed, not counting those in equivalent.txt.
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
MIN_KILLED = 0.95
"""Minimum share of killed mutants."""

KILLED, TIMED_OUT, SURVIVED = "killed", "killed: the tests timed out", "survived"
EQUIVALENT, STALE = "survived, listed as equivalent", "killed, but listed as equivalent"
"""Possible outcomes of a mutant."""

TESTS = {
    "models/attention.py": "unit/test_attention unit/test_dit",
    "models/blocks.py": "unit/test_dit unit/test_zoo unit/test_weights",
    "models/checkpointing.py": "unit/test_checkpointing unit/test_activations",
    "models/dit.py": "unit/test_dit unit/test_zoo unit/test_weights",
    "models/embeddings.py": "unit/test_embeddings unit/test_dit",
    "models/table.py": "unit/test_zoo",
    "models/zoo.py": "unit/test_zoo unit/test_dit",
    "diffusion/gaussian.py": "unit/test_gaussian unit/test_loss unit/test_sampler",
    "diffusion/loss.py": "unit/test_loss unit/test_objective",
    "diffusion/guidance.py": "unit/test_sampler_guidance",
    "diffusion/methods.py": "unit/test_solvers_diffusers unit/test_sample",
    "diffusion/multistep.py": "unit/test_solvers unit/test_solvers_diffusers",
    "diffusion/sampler.py": "unit/test_sampler",
    "diffusion/schedule.py": "unit/test_schedule unit/test_gaussian unit/test_sampler",
    "diffusion/spacing.py": "unit/test_schedule unit/test_solvers",
    "data/order.py": "golden/test_formats unit/test_order property/test_order",
    "checkpoint/attempts.py": "unit/test_attempts unit/test_checkpoint unit/test_retention",
    "checkpoint/manifest.py": "golden/test_formats unit/test_checkpoint unit/test_attempts",
    "checkpoint/partition.py": "unit/test_checkpoint unit/test_saver",
    "checkpoint/rankfile.py": "golden/test_formats unit/test_checkpoint unit/test_saver",
    "checkpoint/reader.py": "golden/test_formats unit/test_checkpoint unit/test_retention",
    "checkpoint/retention.py": "unit/test_retention",
    "checkpoint/saver.py": "unit/test_saver unit/test_checkpoint",
    "checkpoint/slices.py": "golden/test_formats unit/test_checkpoint unit/test_saver",
    "checkpoint/writer.py": "unit/test_writer unit/test_checkpoint unit/test_retention unit/test_saver",
    "rng/cpu.py": "golden/test_formats unit/test_rng",
    "rng/plain.py": "golden/test_formats unit/test_rng",
    "train/objective.py": "unit/test_objective",
}
"""File of dit_scale => tests that can detect a change of it, its own tests first."""


def tests_of(file: str) -> tuple[str, ...]:
    """Return the test files for a mutant of `file`, a path relative to the root."""
    return tuple(f"tests/{name}.py" for name in TESTS[file.removeprefix("dit_scale/")].split())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="parallel trials (default 2)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the copies are removed
    started_s = time.monotonic()
    mutants = sample.choose(ROOT, [f"dit_scale/{file}" for file in TESTS], COUNT, args.seed)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        bench = Bench(ROOT, Path(folder), args.jobs)
        seconds = durations(bench, sorted({file for mutant in mutants for file in tests_of(mutant.file)}))
        trials = [trial_of(mutant, seconds) for mutant in mutants]
        verdicts = run(bench, trials, f"mutants of seed {args.seed}")
    minutes = (time.monotonic() - started_s) / 60
    text, passed = report(mutants, verdicts, equivalent.read(equivalent.LIST.read_text()))
    print(f"{text}\nseed {args.seed}, {minutes:.1f} minutes")
    return 0 if passed else 1


def durations(bench: Bench, files: Sequence[str]) -> dict[str, float]:
    """Return each test file's seconds without a mutant. Exits with a message if one fails."""
    verdicts = run(bench, [Trial((file,), 600) for file in files], "unchanged")
    for file, verdict in zip(files, verdicts, strict=True):
        if verdict.exit_code != 0:
            sys.exit(f"{verdict.output}\n{file} fails without a mutant; fix that first")
    return {file: verdict.seconds for file, verdict in zip(files, verdicts, strict=True)}


def trial_of(mutant: Mutant, seconds: dict[str, float]) -> Trial:
    """Make the trial of a mutant; its limit is several times the duration without a mutant."""
    tests = tests_of(mutant.file)
    return Trial(tests, 30 + 5 * sum(seconds[file] for file in tests), mutant.file, mutant.source)


def run(bench: Bench, trials: Sequence[Trial], what: str) -> list[Verdict]:
    """Run all trials with a progress bar and return their verdicts in order."""
    verdicts: dict[int, Verdict] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # No refresh thread: a lock that it holds would stay locked in a forked process.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task(what, total=len(trials))
        for number, verdict in bench.run(trials):
            verdicts[number] = verdict
            progress.update(task, advance=1, refresh=True)
    return [verdicts[number] for number in range(len(trials))]


def report(
    mutants: Sequence[Mutant], verdicts: Sequence[Verdict], reasons: dict[equivalent.Name, str]
) -> tuple[str, bool]:
    """Return a report, and whether enough mutants were killed."""
    lines: list[str] = []
    count = Counter[str]()
    for mutant, verdict in zip(mutants, verdicts, strict=True):
        word = outcome_of(verdict, mutant.name in reasons)
        count[word] += 1
        if word != KILLED:
            lines += [f"{mutant.file}:{mutant.line}: {word}", mutant.text, ""]
    killed = count[KILLED] + count[TIMED_OUT] + count[STALE]
    share = killed / max(killed + count[SURVIVED], 1)
    lines.append(
        f"{killed} killed ({count[TIMED_OUT]} timed out), {count[SURVIVED]} survived, "
        f"{count[EQUIVALENT]} equivalent: {share:.1%}, expected {MIN_KILLED:.0%} or more"
    )
    if count[STALE]:
        lines.append("some mutants in equivalent.txt are killed; remove them from the file")
    return "\n".join(lines), share >= MIN_KILLED and not count[STALE]


def outcome_of(verdict: Verdict, listed: bool) -> str:
    """Return the outcome of a mutant."""
    if verdict.exit_code == 0:
        return EQUIVALENT if listed else SURVIVED
    if listed:
        return STALE
    return TIMED_OUT if verdict.exit_code is None else KILLED


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
