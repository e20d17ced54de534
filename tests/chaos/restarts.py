"""Kill and stop ranks of a supervised run a hundred times in a row and time the restarts.

    make chaos
    python -m tests.chaos.restarts --cycles 100 --stops 20 --seed 0 --out runs/restarts

Exits with 1 when a restart is missing, the wrong rank is blamed, or the result differs from an undisturbed
run in any bit. OUT/report.json lists every cycle; the table shows where the time of a restart goes.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from dit_scale.config import TrainConfig
from tests.support.nodes.nodes import Cluster, Node, cluster, config_of
from tests.support.ranks import jobs
from tests.support.ranks.processes import run
from tests.support.ranks.record import differences_at_the_end, last_step

STEPS_PER_CYCLE = 8
STRAIGHT_S = 3600.0
"""Time limit for the undisturbed run."""
PHASES = (
    ("failure noticed", "round_ended"),
    ("ranks ended", "ranks_gone"),
    ("nodes gathered", "ranks_started"),
    ("launcher", "first_beat"),
    ("imports and engine", "engine_ready"),
    ("restored", "restored"),
    ("first step", "first_step"),
)
"""The phases of a restart, and the event that ends each."""

Cycle = dict[str, Any]


def cycle(nodes: Cluster, draws: random.Random, stop: bool) -> Cycle:
    """Kill or stop a rank some steps later, and follow the run until it takes a new step."""
    nodes.wait_for_commit()
    nodes.wait_for_step(last_step(_record(nodes.config)) + draws.randrange(1, STEPS_PER_CYCLE // 2))
    node = draws.choice(nodes.nodes)
    rank, pid = draws.choice(sorted(node.ranks().items()))
    first = nodes.nodes[0]
    number = first.events("round")[-1]["round"]
    at_s = time.monotonic()
    os.kill(pid, signal.SIGSTOP if stop else signal.SIGKILL)
    nodes.wait_for_round(first, number + 1)
    times_s = [first.events(event)[-1]["monotonic_s"] for _, event in PHASES]
    ending = first.events("round_ended")[-1]
    return {
        "stop": stop,
        "right": f"rank {rank} (process {pid})" in ending["text"] and ending["failed_node"] == node.name,
        "text": ending["text"],
        "load": os.getloadavg()[0],
        "total_s": times_s[-1] - at_s,
        "phases_s": [end - begin for begin, end in zip([at_s, *times_s], times_s, strict=False)],
    }


def campaign(cycles: int, stops: int, num_nodes: int, seed: int, out: Path) -> tuple[list[Cycle], list[str]]:
    """Run the cycles; return them, and what is wrong with the finished run."""
    draws = random.Random(seed)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    steps = STEPS_PER_CYCLE * (cycles + stops) + 20
    config = config_of(out, steps, every_steps=3)
    kinds = [False] * cycles + [True] * stops
    draws.shuffle(kinds)
    done: list[Cycle] = []
    with cluster(config) as nodes:
        supervisors = _start(nodes, num_nodes)
        nodes.wait_for_step(1)
        for stop in kinds:
            done.append(cycle(nodes, draws, stop))
            print(
                f"{len(done)}/{len(kinds)}: {done[-1]['total_s']:.1f} s, {done[-1]['text'][:90]}", flush=True
            )
        codes = [node.exit_code() for node in supervisors]
    problems = [f"exit codes {codes}, expected 0"] if any(codes) else []
    straight = config.model_copy(update={"run": str(out / "straight")})
    run(2, jobs.train, straight, timeout_s=STRAIGHT_S)
    return done, problems + differences_at_the_end(config, straight)


def _start(nodes: Cluster, num_nodes: int) -> list[Node]:
    """Start two ranks on one node or two."""
    names = ("a", "b")[:num_nodes]
    arguments = ("--nodes", str(num_nodes), "--lease-s", "3")
    return [nodes.start(name, *arguments, slots=2 // num_nodes) for name in names]


def _record(config: TrainConfig) -> Path:
    return Path(config.run) / "metrics.jsonl"


def table(done: list[Cycle]) -> str:
    """Return the median and the 95th percentile of each phase, for kills and for stops."""
    lines = []
    for stop, name in ((False, "kill"), (True, "stop")):
        rows = [one for one in done if one["stop"] == stop]
        if not rows:
            continue
        right = sum(one["right"] for one in rows)
        lines.append(f"{name}: {len(rows)} cycles, {right} blamed the right rank")
        columns = [[one["phases_s"][i] for one in rows] for i in range(len(PHASES))]
        columns.append([one["total_s"] for one in rows])
        for label, values in zip([*(label for label, _ in PHASES), "total"], columns, strict=True):
            p95 = sorted(values)[(len(values) * 95 - 1) // 100]
            lines.append(f"  {label:20} median {statistics.median(values):6.2f} s   p95 {p95:6.2f} s")
    load = statistics.median(one["load"] for one in done)
    return "\n".join([*lines, f"median machine load {load:.1f} on {os.cpu_count()} cores"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=100, help="number of kills (default 100)")
    parser.add_argument(
        "--stops", type=int, default=20, help="number of ranks stopped with SIGSTOP (default 20)"
    )
    parser.add_argument(
        "--nodes", type=int, default=1, choices=(1, 2), help="nodes for the two ranks (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of victims and moments (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/restarts"), help="output folder (default runs/restarts)"
    )
    args = parser.parse_args()
    done, problems = campaign(args.cycles, args.stops, args.nodes, args.seed, args.out.absolute())
    (args.out / "report.json").write_text(json.dumps({"cycles": done, "problems": problems}, indent=1))
    print(table(done))
    print("\n".join(problems) or "bit for bit equal to the undisturbed run")
    return 0 if not problems and all(one["right"] for one in done) else 1


if __name__ == "__main__":
    sys.exit(main())
