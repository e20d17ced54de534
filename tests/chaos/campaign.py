"""Kills a training run at random, hundreds of times, and compares what comes of it with a run left alone.

    make chaos
    python -m tests.chaos.campaign --kills 200 --seed 0 --out runs/chaos

A part of the kills goes to each ZeRO stage. Leaves with 1 when a bit differs, when a run fails by itself,
or when less than a quarter of the kills fell inside a save. The report is in OUT/report.md and report.json.
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
"""More than a cycle gets on by, in the mean."""

Say = Callable[[str], None]


def new_stage(stage: int, kills: int) -> StageResult:
    """Nothing is done of it yet."""
    return StageResult(stage, steps=STEPS_PER_KILL * kills + 20, wanted=kills)


def run_stage(result: StageResult, draws: random.Random, folder: Path, say: Say) -> None:
    """Kill a run as often as wanted, let it end, and compare. `say` is told of every kill."""
    shutil.rmtree(folder, ignore_errors=True)
    write_latents(folder / "data", num=40)
    straight = config_of(folder, "straight", result)
    output = folder / "output.log"
    try:
        say("the run that nobody disturbs")
        undisturbed(straight, output)
        hunt = Hunt(config_of(folder, "killed", result), output)
        _kill_again_and_again(hunt, record.rows(straight), result, draws, say)
        say("the killed run, to its end")
        undisturbed(hunt.config, output)
        _compare(hunt.config, straight, result)
    except RunError as error:
        after = len(result.kills) + len(result.kills_at_start)
        result.problems.append(f"after kill {after}: {error} (see {output})")


def config_of(folder: Path, name: str, result: StageResult) -> TrainConfig:
    """Of the run that is left alone (`straight`), or of the one that is `killed`."""
    config = jobs.small_config(folder / name, folder / "data", "DiT-Ti/2", zero_stage=result.stage)
    # The straight run stores averages as often as it can: at many of the steps at which the other did.
    ema_every_steps = 1 if name == "straight" else 6
    return jobs.saving(config, result.steps, every_steps=3, ema_every_steps=ema_every_steps, keep=2)


def _kill_again_and_again(
    hunt: Hunt, wanted: list[record.Row], result: StageResult, draws: random.Random, say: Say
) -> None:
    """Raises RunError at the first row that differs, and when the run fails by itself."""
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
    """The whole campaign, with a progress line. What a stage leaves is deleted unless it has a problem."""
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
    """Kill what this process has started and not ended."""
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how many, over all stages (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments (default 0)")
    parser.add_argument("--stage", type=int, choices=STAGES, help="one ZeRO stage only (default all three)")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder (default runs/chaos)")
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
