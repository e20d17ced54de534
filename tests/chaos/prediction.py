"""The simulator against reality: predict a run of three failing nodes, then run it.

    make chaos
    python -m tests.chaos.prediction --minutes 8 --seed 0

First, a short run measures the durations of steps, saves and restarts on this machine, with three nodes and
with two. Then three `dit-scale launch` train while their ranks are killed and stopped and their supervisors
are killed, by a plan drawn from the seed. `simulate` gets the measured durations and the same plan. Exits
with 1 if wall-clock time or goodput differ by more than a tenth.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from dit_scale.config import TrainConfig
from dit_scale.elastic.board import Reason
from dit_scale.elastic.policy import Policy
from dit_scale.forecast.simulate import Failure, SimulationSetup, simulate
from dit_scale.forecast.timeline import Costs, FailureKind
from dit_scale.journal import Event, read_journal
from dit_scale.ledger import Heading, Ledger
from dit_scale.report.goodput import ledger
from dit_scale.report.spans import AttemptSpan, attempts_of
from tests.support.nodes.nodes import Cluster, Node, cluster, config_of

NAMES = ("a", "b", "c")
POLICY = Policy(2, 3, lease_s=3.0, grow_s=5.0)
ARGUMENTS = ("--nodes", f"{POLICY.min_nodes}:{POLICY.max_nodes}", "--grow-s", str(POLICY.grow_s))
ARGUMENTS += ("--lease-s", str(POLICY.lease_s))
EVERY_STEPS = 30
GAP_S = (35.0, 60.0)
"""Time between two failures of the plan."""
BACK_S = 15.0
"""From the death of a supervisor to its next start."""
MAX_ERROR = 0.1
FAILURES = (Reason.FAILED, Reason.HUNG, Reason.LOST)

MEASURING = (
    Failure(30.0, 0, FailureKind.CRASH),
    Failure(60.0, 1, FailureKind.STOP),
    Failure(100.0, 2, FailureKind.DEATH),
    Failure(130.0, 1, FailureKind.CRASH),
    Failure(190.0, 0, FailureKind.CRASH),
)
MEASURING_BACK_S, MEASURING_S = 50.0, 220.0
"""How long the third node is away, and when all nodes are asked to stop."""

PRODUCTIVE = (Heading.PRODUCTIVE, Heading.DEGRADED, Heading.DATA)
ROWS: tuple[tuple[str, tuple[Heading, ...]], ...] = (
    ("productive steps", PRODUCTIVE),
    ("replayed, detect", (Heading.REPLAYED, Heading.DETECT)),
    ("save stall", (Heading.CHECKPOINT,)),
    ("restart", (Heading.STARTUP, Heading.RESTART)),
    ("restore", (Heading.RESTORE,)),
    ("waiting", (Heading.WAITING, Heading.STOPPED)),
)
"""Headings that are compared together. Journals do not record when a rank was killed, so in a real run the
time until that is detected counts as replayed steps."""


@dataclass
class RealRun:
    """A run that was disturbed, and what only the disturber can measure."""

    config: TrainConfig
    boots_s: list[float]
    """From the start of a supervisor to its first journal entry."""
    breaks_s: list[float]
    """From the death of a supervisor to the first report that ranks of another node have failed."""
    loads: list[float]
    """Load of the machine at every failure."""

    @property
    def supervisors(self) -> dict[str, list[dict[str, Any]]]:
        folder = Path(self.config.run) / "supervisors"
        return {name: read_journal(folder / f"{name}.jsonl") for name in NAMES}

    @property
    def journal(self) -> list[dict[str, Any]]:
        return read_journal(Path(self.config.run) / "events.jsonl")

    def ledger(self) -> Ledger:
        return ledger(self.journal, self.supervisors)

    def reasons(self) -> list[str]:
        """Why its rounds ended."""
        entries = [entry for entries in self.supervisors.values() for entry in entries]
        endings = [entry for entry in entries if entry["event"] == Event.ROUND_ENDED]
        return [reason for _, reason in sorted({(entry["round"], entry["reason"]) for entry in endings})]


def run_with(
    config: TrainConfig, failures: Sequence[Failure], back_s: float, stop_s: float | None
) -> RealRun:
    """Run three nodes through their failures, until they are done or, after `stop_s`, asked to stop."""
    run = RealRun(config, [], [], [])
    with cluster(config) as nodes:
        running = {name: nodes.start(name, *ARGUMENTS) for name in NAMES}
        nodes.wait(lambda: all(node.events("joined") for node in running.values()), "first join")
        begin_s = max(node.events("joined")[0]["monotonic_s"] for node in running.values())
        agenda: list[tuple[float, Failure | str]] = [(failure.at_s, failure) for failure in failures]
        while agenda:
            agenda.sort(key=lambda item: item[0])
            at_s, item = agenda.pop(0)
            while time.monotonic() < begin_s + at_s:
                time.sleep(0.01)
            if any(node.process.poll() == 0 for node in running.values()):
                break
            if isinstance(item, str):
                running[item] = _start_again(nodes, item, run)
            elif running[NAMES[item.node]].process.poll() is None:
                run.loads.append(os.getloadavg()[0])
                _fail(running[NAMES[item.node]], item.kind, run)
                if item.kind == FailureKind.DEATH:
                    agenda.append((at_s + back_s, NAMES[item.node]))
        if stop_s is not None:
            time.sleep(max(0.0, begin_s + stop_s - time.monotonic()))
            for node in running.values():
                node.process.send_signal(signal.SIGTERM)
        codes = {name: node.exit_code() for name, node in running.items() if node.process.poll() != -9}
    expected = 0 if stop_s is None else 75
    assert set(codes.values()) == {expected}, f"exit codes {codes}, expected {expected}"
    return run


def _start_again(nodes: Cluster, name: str, run: RealRun) -> Node:
    begin_s = time.monotonic()
    node = nodes.start(name, *ARGUMENTS)

    def joins() -> list[float]:
        return [e["monotonic_s"] for e in node.events("joined") if e["monotonic_s"] > begin_s]

    nodes.wait(lambda: bool(joins()) or node.process.poll() is not None, "join")
    run.boots_s += [join_s - begin_s for join_s in joins()[:1]]
    return node


def _fail(node: Node, kind: FailureKind, run: RealRun) -> None:
    """Make a node fail. Ranks that are not running at the moment cannot fail."""
    if kind != FailureKind.DEATH:
        for pid in node.ranks().values():
            os.kill(pid, signal.SIGKILL if kind == FailureKind.CRASH else signal.SIGSTOP)
        return
    reported_before = set(_reports(run.config))
    at_s = time.time()
    node.kill()
    end_s = time.monotonic() + POLICY.lease_s
    while time.monotonic() < end_s:
        if new := set(_reports(run.config)) - reported_before:
            # A supervisor reports at its next poll, on average half a poll interval later.
            run.breaks_s.append(min(path.stat().st_mtime for path in new) - at_s - POLICY.look_s / 2)
            return
        time.sleep(0.01)


def _reports(config: TrainConfig) -> list[Path]:
    return sorted((Path(config.run) / "elastic" / "reports").glob("*/*.json"))


def costs_of(run: RealRun, nodes: int) -> Costs:
    """Mean durations over the restarts of a run with this number of nodes, from its journals."""
    rounds: dict[int, list[dict[str, Any]]] = {}
    for entry in (entry for entries in run.supervisors.values() for entry in entries if "round" in entry):
        rounds.setdefault(entry["round"], []).append(entry)
    sizes = {number: _size(entries) for number, entries in rounds.items()}
    started = sorted((_last(entries, Event.RANKS_STARTED), n) for n, entries in rounds.items() if sizes[n])
    measured = []
    for attempt in attempts_of(run.journal):
        start_s = attempt.entries[0][1]["monotonic_s"]
        begin_s, number = max(start for start in started if start[0] < start_s)
        if sizes[number] == nodes and any(e["event"] == Event.FIRST_STEP for _, e in attempt.entries):
            measured.append((begin_s, attempt))
    failed = [entries for entries in rounds.values() if any(e.get("reason") in FAILURES for e in entries)]
    exits_s = [_last(entries, Event.RANKS_GONE) - _last(entries, Event.ROUND_ENDED) for entries in failed]
    return _means(measured, _mean(exits_s))


def _size(entries: Sequence[dict[str, Any]]) -> int:
    """Members of a round; 0 unless all of them started their ranks."""
    nodes = max((len(entry["nodes"]) for entry in entries if entry["event"] == Event.ROUND), default=0)
    return nodes if sum(entry["event"] == Event.RANKS_STARTED for entry in entries) == nodes else 0


def _last(entries: Sequence[dict[str, Any]], event: Event) -> float:
    return max((entry["monotonic_s"] for entry in entries if entry["event"] == event), default=0.0)


def _means(measured: Sequence[tuple[float, AttemptSpan]], exit_s: float) -> Costs:
    """Means over attempts, each with the time at which the last launcher of its round started."""
    launch_s, restore_s, first_s, work = [], [], [], []
    stalls_s, lags_s = [], []
    for begin_s, attempt in measured:
        entries = [entry for _, entry in attempt.entries]
        start = entries[0]
        first = next(entry for entry in entries if entry["event"] == Event.FIRST_STEP)
        launch_s.append(start["monotonic_s"] - start["restore_s"] - begin_s)
        first_s.append(first["monotonic_s"] - start["monotonic_s"])
        if start["step"]:
            restore_s.append(start["restore_s"])
        stalls_s += [entry["stall_s"] for entry in entries if entry["event"] == Event.SAVE]
        lags_s += [entry["seconds"] for entry in entries if entry["event"] == Event.CHECKPOINT]
        stepping = [e for e in entries if e["event"] in (Event.FIRST_STEP, Event.LOG, Event.SAVE)]
        for before, after in pairwise(stepping):
            seconds = after["monotonic_s"] - before["monotonic_s"] - after.get("stall_s", 0.0)
            work.append((seconds, after["step"] - before["step"]))
    step_s = sum(seconds for seconds, _ in work) / max(1, sum(steps for _, steps in work))
    return Costs(
        step_s=step_s,
        save_stall_s=_mean(stalls_s),
        commit_lag_s=_mean(lags_s),
        launch_s=_mean(launch_s) + exit_s,
        init_s=0.0,
        restore_s=_mean(restore_s),
        first_step_s=_mean(first_s) - step_s,
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else 0.0


def plan_of(seconds: float, seed: int) -> list[Failure]:
    """Failures of all kinds after which a node stays or comes back."""
    draws = random.Random(seed)
    failures: list[Failure] = []
    at_s = draws.uniform(*GAP_S)
    kinds: list[FailureKind] = []
    while at_s < seconds:
        kinds = kinds or draws.sample(
            [FailureKind.CRASH, FailureKind.CRASH, FailureKind.STOP, FailureKind.DEATH], 4
        )
        failures.append(Failure(at_s, draws.randrange(len(NAMES)), kinds.pop()))
        at_s += draws.uniform(*GAP_S)
    return failures


def setup_of(run: RealRun, steps: int = 1) -> SimulationSetup:
    """A simulation with the durations of a real run."""
    costs = {nodes: replace(costs_of(run, nodes), break_s=_mean(run.breaks_s)) for nodes in (2, 3)}
    return SimulationSetup(
        nodes=3,
        steps=steps,
        every_steps=EVERY_STEPS,
        costs=costs[3],
        measured=costs,
        policy=POLICY,
        repair_s=BACK_S + _mean(run.boots_s),
    )


def steps_for(seconds: float, setup: SimulationSetup, failures: Sequence[Failure]) -> int:
    """The number of steps of a run of about this length."""
    steps = round(seconds / setup.costs.step_s / 2)
    for _ in range(4):
        steps = round(steps * seconds / simulate(replace(setup, steps=steps), failures).wall_s)
    return steps


def config_for(folder: Path, steps: int) -> TrainConfig:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = config_of(folder, steps, EVERY_STEPS)
    return config.model_copy(
        update={"global_batch": 12, "log": config.log.model_copy(update={"every_steps": 10})}
    )


def table(real: Ledger, predicted: Ledger) -> str:
    """Both ledgers, in seconds."""
    lines = [f"{'':18}{'real':>9}{'predicted':>11}"]
    for name, headings in ROWS:
        lines.append(f"{name:18}{real.seconds(*headings):9.1f}{predicted.seconds(*headings):11.1f}")
    error = predicted.wall_s / real.wall_s - 1
    lines.append(f"{'wall-clock time':18}{real.wall_s:9.1f}{predicted.wall_s:11.1f}   {error:+.1%}")
    goodputs = goodput(real), goodput(predicted)
    error = goodputs[1] / goodputs[0] - 1
    lines.append(f"{'goodput':18}{goodputs[0]:9.1%}{goodputs[1]:11.1%}   {error:+.1%}")
    return "\n".join(lines)


def _durations(setup: SimulationSetup) -> str:
    lines = [
        f"  {nodes} nodes: " + ", ".join(f"{name} {value:.3g}" for name, value in asdict(costs).items())
        for nodes, costs in setup.measured.items()
    ]
    return "\n".join([*lines, f"  a supervisor is back after {setup.repair_s:.1f} s"])


def goodput(spent: Ledger) -> float:
    """Share of the wall-clock time spent on steps that count, at whatever speed."""
    return spent.seconds(*PRODUCTIVE) / spent.wall_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="length of the predicted run (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of its failures (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/prediction"), help="folder (runs/prediction)")
    args = parser.parse_args()
    out = args.out.absolute()
    measured = run_with(config_for(out / "measured", 10**6), MEASURING, MEASURING_BACK_S, MEASURING_S)
    setup, seconds = setup_of(measured), 60 * args.minutes
    print(f"measured:\n{_durations(setup)}", flush=True)
    failures = plan_of(seconds - GAP_S[0], args.seed)
    setup = replace(setup, steps=steps_for(seconds, setup, failures))
    predicted = simulate(setup, failures)
    print("plan: " + ", ".join(f"{f.at_s:.0f} s {f.kind} {NAMES[f.node]}" for f in failures), flush=True)
    run = run_with(config_for(out / "real", setup.steps), failures, BACK_S, None)
    real = run.ledger()
    print(table(real, predicted.ledger))
    endings = ", ".join(sorted(predicted.endings.elements()))
    print(f"rounds ended: {', '.join(run.reasons())}; predicted {endings}")
    loads = statistics.mean(measured.loads), statistics.mean(run.loads)
    print(f"load {loads[0]:.1f} while measuring, {loads[1]:.1f} in the run, on {os.cpu_count()} cores")
    print(f"durations in that run:\n{_durations(setup_of(run))}")
    own = simulate(setup_of(run, setup.steps), failures).ledger
    print(f"predicted from these: wall-clock time {own.wall_s:.1f} s, goodput {goodput(own):.1%}")
    outcomes = {
        name: (of.wall_s, goodput(of)) for name, of in (("real", real), ("predicted", predicted.ledger))
    }
    (out / "report.json").write_text(json.dumps({**outcomes, "loads": loads}))
    errors = [guess / fact - 1 for guess, fact in zip(outcomes["predicted"], outcomes["real"], strict=True)]
    return int(max(map(abs, errors)) > MAX_ERROR)


if __name__ == "__main__":
    sys.exit(main())
