"""Kill a training run at random hundreds of times and compare the result with an undisturbed run.

    make chaos
    python -m tests.chaos.campaign --kills 200 --seed 0 --out runs/chaos

Each ZeRO stage gets a share of the kills. Exits with 1 when a bit differs, when a run fails on its own, or
when less than a quarter of the kills hit a save. The report is in OUT/report.md and OUT/report.json.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dit_scale.config import TrainConfig
from tests.chaos import stacks
from tests.chaos.hunt import Hunt, RunError, draw, undisturbed
from tests.chaos.report import Campaign, StageResult, as_text, as_tree
from tests.support.latents import write_latents
from tests.support.ranks import jobs, record

STAGES = (1, 2, 3)
STEPS_PER_KILL = 6
"""A cycle progresses less than this on average."""

Say = Callable[[str], None]


def new_stage(stage: int, kills: int) -> StageResult:
    """Return an empty result for one ZeRO stage."""
    return StageResult(stage, steps=STEPS_PER_KILL * kills + 20, wanted=kills)


def run_stage(result: StageResult, draws: random.Random, folder: Path, say: Say) -> None:
    """Kill a run as often as asked, let it finish, and compare. `say` is called for every kill."""
    shutil.rmtree(folder, ignore_errors=True)
    write_latents(folder / "data", num=40)
    straight = config_of(folder, "straight", result)
    output = folder / "output.log"
    try:
        say("undisturbed run")
        undisturbed(straight, output)
        hunt = Hunt(config_of(folder, "killed", result), output)
        _kill_again_and_again(hunt, record.rows(straight), result, draws, say)
        say("killed run, to its last step")
        undisturbed(hunt.config, output)
        _compare(hunt.config, straight, result)
    except RunError as error:
        after = len(result.kills) + len(result.kills_at_start)
        result.problems.append(f"after kill {after}: {error} (see {output})")


def config_of(folder: Path, name: str, result: StageResult) -> TrainConfig:
    """Return the configuration of the undisturbed run (`straight`) or of the run that is `killed`."""
    config = jobs.small_config(folder / name, folder / "data", "DiT-Ti/2", zero_stage=result.stage)
    # The undisturbed run stores averages at every step, to match many of the stored averages of the other.
    ema_every_steps = 1 if name == "straight" else 6
    return jobs.saving(config, result.steps, every_steps=3, ema_every_steps=ema_every_steps, keep=2)


def _kill_again_and_again(
    hunt: Hunt, wanted: list[record.Row], result: StageResult, draws: random.Random, say: Say
) -> None:
    """Raise RunError at the first row that differs, or when the run fails on its own."""
    while len(result.kills) < result.wanted:
        kill = hunt.cycle(draw(draws))
        if kill is not None:
            (result.kills if kill.counts else result.kills_at_start).append(kill)
            say(f"{kill.victim} at step {kill.step}: {kill.section}")
        difference = record.first_difference(record.rows(hunt.config), wanted)
        if difference:
            raise RunError(f"the record differs: {difference}")


def _compare(killed: TrainConfig, straight: TrainConfig, result: StageResult) -> None:
    result.problems += record.differences_at_the_end(killed, straight)
    result.rows_compared = len(record.rows(killed))
    result.averages_compared, differing = record.compare_averages(killed, straight)
    result.problems += differing


def run(kills: int, seed: int, stages: tuple[int, ...], out: Path) -> Campaign:
    """Run the campaign with a progress line. Delete the files of a stage unless it has a problem."""
    campaign = Campaign(seed)
    begin_s = time.monotonic()
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=kills)
        for index, stage in enumerate(stages):
            share = kills * (index + 1) // len(stages) - kills * index // len(stages)
            result = new_stage(stage, share)
            campaign.stages.append(result)

            def say(text: str, stage: int = stage) -> None:
                bar.update(task, completed=len(campaign.kills), description=f"ZeRO-{stage}: {text}")

            folder = out / f"stage{stage}"
            run_stage(result, random.Random(f"{seed}/{stage}"), folder, say)
            if not result.problems:
                shutil.rmtree(folder)
    campaign.wall_s = time.monotonic() - begin_s
    return campaign


def end_processes() -> None:
    """Kill the child processes that are still running."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--kills", type=int, default=200, help="number of kills over all stages (default 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of victims and moments (default 0)")
    parser.add_argument(
        "--stage", type=int, choices=STAGES, help="run one ZeRO stage only (default all three)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/chaos"), help="output folder (default runs/chaos)"
    )
    args = parser.parse_args()
    if reason := stacks.why_not():
        parser.error(reason)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        campaign = run(args.kills, args.seed, (args.stage,) if args.stage else STAGES, args.out)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        end_processes()
    text = as_text(campaign)
    (args.out / "report.md").write_text(text)
    (args.out / "report.json").write_text(json.dumps(as_tree(campaign), indent=1))
    print(text)
    return 0 if campaign.passed else 1


if __name__ == "__main__":
    sys.exit(main())
