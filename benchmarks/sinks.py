"""What mirrors cost the loop of rank 0, and what scrapes cost the supervisor.

    python -m benchmarks.sinks                 # about 5 minutes, of which most is waiting
    python -m benchmarks.sinks --smoke         # tiny: checks that it works

A process goes through the steps of a run as rank 0 does: each step waits 50 ms, as for a GPU, and at a log
point it writes a full row and a journal entry through the real logbook, with all mirrors or with none.
Nothing else uses the processor, so its CPU time, all threads included, is that of logging. Mirrors that are
not installed are left out, and the title says which ones write. wandb's own process is counted separately.

The supervisor's part: the CPU time of a scrape of a run with many log points, the first and later ones.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.train_step import cpu_name
from dit_scale.config import TrainConfig
from dit_scale.elastic.launch import NodeLog
from dit_scale.journal import Event
from dit_scale.monitoring.exporter import NodeCollector
from dit_scale.monitoring.families import ROW
from dit_scale.monitoring.follower import Follower
from dit_scale.storage import open_storage
from dit_scale.train.logbook import Carried, Logbook

STEP_S = 0.05
MIRRORS = tuple(name for name in ("wandb", "tensorboard", "trackio") if find_spec(name) is not None)


@dataclass(frozen=True)
class Cost:
    """What logging costs per step."""

    mirrors: bool
    every_steps: int
    steps: int
    rows: int
    """Rows that were written."""
    cpu_ms: float
    """CPU time of the process per step."""
    loop_ms: float
    """Time that the loop waited for the logbook, per step."""
    children_cpu_ms: float
    """CPU time of the processes that the mirrors started, per step."""

    @property
    def share(self) -> float:
        """CPU time as a share of a step."""
        return self.cpu_ms / 1000 / STEP_S


@dataclass(frozen=True)
class Scrape:
    """CPU time of a scrape."""

    log_points: int
    first_ms: float
    later_ms: float
    """Median of scrapes with one new log point each."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=1000, help="steps per case (default 1000)")
    parser.add_argument("--log-points", type=int, default=40_000, help="of the scraped run (default 40000)")
    parser.add_argument("--smoke", action="store_true", help="20 short steps, 100 log points")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    steps, log_points, step_s = args.steps, args.log_points, STEP_S
    if args.smoke:
        steps, log_points, step_s = 20, 100, 0.001
    costs = []
    for every_steps in (100, 10):
        for mirrors in (False, True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # mirrors live as long as a process
                costs.append(pool.apply(measure, (mirrors, min(every_steps, steps), steps, step_s)))
    scrape = scraped(log_points)
    if args.json:
        rows = [asdict(cost) | {"share": cost.share} for cost in costs]
        print(json.dumps({"mirrors": MIRRORS, "costs": rows, "scrape": asdict(scrape)}))
    else:
        show(costs, scrape)
    return 0


def measure(mirrors: bool, every_steps: int, steps: int, step_s: float) -> Cost:
    """Go through the steps of a run, and check that its record has all rows."""
    folder = Path(tempfile.mkdtemp(prefix="dit-scale-sinks-"))
    os.environ["HOME"] = str(folder)  # no settings or keys of the user
    log = {"every_steps": every_steps}
    if mirrors:
        log |= {name: "offline" if name == "wandb" else True for name in MIRRORS}
    config = TrainConfig.model_validate({"run": str(folder / "run"), "log": log})
    Path(config.run).mkdir()
    step, problems = 0, list[str]()
    logbook = Logbook(
        config=config,
        root=open_storage(config.run),
        attempt=1,
        carried=Carried(),
        step=lambda: step,
        say=problems.append,
    )
    logbook.event(Event.START)
    loop_s, cpu_s = 0.0, time.process_time()
    for step in range(1, steps + 1):
        time.sleep(step_s)
        if step % every_steps == 0:
            start_s = time.perf_counter()
            logbook.row({gauge.key: 0.125 * step for gauge in ROW})
            logbook.event(Event.LOG, data_s=0.0)
            loop_s += time.perf_counter() - start_s
    cpu_s = time.process_time() - cpu_s
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    logbook.close()
    assert not problems, problems
    rows = len((Path(config.run) / "metrics.jsonl").read_text().splitlines())
    shutil.rmtree(folder, ignore_errors=True)
    return Cost(
        mirrors=mirrors,
        every_steps=every_steps,
        steps=steps,
        rows=rows,
        cpu_ms=1000 * cpu_s / steps,
        loop_ms=1000 * loop_s / steps,
        children_cpu_ms=1000 * sum(spent.user + spent.system for spent in children) / steps,
    )


def scraped(log_points: int) -> Scrape:
    """Measure scrapes of a run with this number of log points, 10 steps apart, a save every 500 of them."""
    with tempfile.TemporaryDirectory(prefix="dit-scale-sinks-") as name:
        folder, config = Path(name), TrainConfig(run=name)
        log = NodeLog("a", folder / "supervisors/a.jsonl")
        log.record(Event.ROUND, round=1, nodes=["a"])
        with (folder / "events.jsonl").open("w") as journal, (folder / "metrics.jsonl").open("w") as record:
            journal.writelines(_entries(number) for number in range(log_points))
            record.writelines(_row(number) for number in range(log_points))
        registry = CollectorRegistry(auto_describe=False)
        registry.register(NodeCollector(Follower(config, "a", folder), config, "a", log))
        times_ms = []
        for number in range(log_points, log_points + 21):
            with (
                (folder / "events.jsonl").open("a") as journal,
                (folder / "metrics.jsonl").open("a") as record,
            ):
                journal.write(_entries(number))
                record.write(_row(number))
            start_s = time.process_time()
            text = generate_latest(registry).decode()
            times_ms.append(1000 * (time.process_time() - start_s))
            assert f'dit_scale_step{{node="a",run="{name}"}} {10.0 * number}\n' in text
        log.close()
    return Scrape(log_points, times_ms[0], median(times_ms[1:]))


def _entries(number: int) -> str:
    """Return the lines of the journal at a log point."""
    clocks = {"time_s": 1.5e9 + 10 * number, "monotonic_s": 10.0 * number, "attempt": 1, "step": 10 * number}
    entries = [{"event": Event.LOG if number else Event.START, "data_s": 0.1 * number, **clocks}]
    if number % 500 == 499:
        entries.append({"event": Event.SAVE, "stall_s": 0.2, **clocks})
        entries.append({"event": Event.CHECKPOINT, "name": f"{10 * number:010d}-0001", **clocks})
    return "".join(f"{json.dumps(entry)}\n" for entry in entries)


def _row(number: int) -> str:
    return json.dumps({"step": 10 * number, **{gauge.key: 0.125 * number for gauge in ROW}}) + "\n"


def show(costs: list[Cost], scrape: Scrape) -> None:
    """Print two tables."""
    console = Console(width=100)
    table = Table(title=f"Logging with {', '.join(MIRRORS)}, 50 ms a step, {cpu_name()}", box=box.SIMPLE)
    for name in ("log every", "mirrors", "CPU per step", "of a step", "the loop waits", "other processes"):
        table.add_column(name, justify="right")
    for cost in costs:
        table.add_row(
            f"{cost.every_steps} steps",
            "all" if cost.mirrors else "none",
            f"{cost.cpu_ms:.3f} ms",
            f"{cost.share:.2%}",
            f"{cost.loop_ms:.3f} ms",
            f"{cost.children_cpu_ms:.3f} ms",
        )
    console.print(table)
    console.print(
        f"A scrape of a run with {scrape.log_points:,} log points: {scrape.first_ms:.0f} ms the first time, "
        f"then {scrape.later_ms:.1f} ms of CPU time"
    )


if __name__ == "__main__":
    raise SystemExit(main())
