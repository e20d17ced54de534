"""The simulator against the real thing: a run of three nodes that fail, foretold and then lived through.

    make chaos
    python -m tests.chaos.prediction --minutes 8 --seed 0

First a short run measures what things take on this machine: steps, saves, restarts, with three nodes and with
two. Then three `dit-scale launch` train while their ranks are killed and stopped and their supervisors are
killed, by a plan from the seed, and `simulate` gets these costs and the same plan. Leaves with 1 when wall
time or goodput differ by more than a tenth.
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
from dit_scale.forecast.simulate import Failure, SimulationResult, SimulationSetup, simulate
from dit_scale.forecast.timeline import Costs, FailureKind, Use
from dit_scale.journal import read_journal
from dit_scale.report.goodput import MICRO, AttemptSpan, Heading, Ledger, attempts_of, ledger
from tests.support.nodes.nodes import Cluster, Node, cluster, config_of

NAMES = ("a", "b", "c")
POLICY = Policy(2, 3, lease_s=3.0, grow_s=5.0)
ARGUMENTS = ("--nodes", f"{POLICY.min_nodes}:{POLICY.max_nodes}", "--grow-s", str(POLICY.grow_s))
ARGUMENTS += ("--lease-s", str(POLICY.lease_s))
EVERY_STEPS = 30
GAP_S = (35.0, 60.0)
"""Between two failures of the plan."""
BACK_S = 15.0
"""From the death of a supervisor to its next start."""
LIMIT = 0.1
FAILURES = (Reason.FAILED, Reason.HUNG, Reason.LOST)

MEASURING = (
    Failure(30.0, 0, FailureKind.CRASH),
    Failure(60.0, 1, FailureKind.STOP),
    Failure(100.0, 2, FailureKind.DEATH),
    Failure(130.0, 1, FailureKind.CRASH),
    Failure(190.0, 0, FailureKind.CRASH),
)
MEASURING_BACK_S, MEASURING_S = 50.0, 220.0
"""The third node is away for so long, and then all are asked to leave."""

ROWS: tuple[tuple[str, tuple[Heading, ...], tuple[Use, ...]], ...] = (
    ("steps that count", (Heading.PRODUCTIVE, Heading.DATA), (Use.PRODUCTIVE, Use.DEGRADED)),
    ("replayed, detect", (Heading.REPLAYED, Heading.DETECT), (Use.REPLAYED, Use.DETECT)),
    ("save stall", (Heading.CHECKPOINT,), (Use.STALL,)),
    ("restart", (Heading.STARTUP, Heading.RESTART), (Use.RESTART,)),
    ("restore", (Heading.RESTORE,), (Use.RESTORE,)),
    ("waiting", (Heading.WAITING, Heading.STOPPED), (Use.WAIT,)),
)
"""Which headings of a real ledger are which of a simulated one. Nobody writes down when a rank was killed, so
the time until that was noticed is among the replayed steps."""


@dataclass
class Lived:
    """A real run, and what only who disturbs it knows."""

    config: TrainConfig
    boots_s: list[float]
    """From the start of a supervisor to its first word."""
    breaks_s: list[float]
    """From the death of a supervisor to the first report that ranks of another have broken off."""
    loads: list[float]
    """Of the machine, at every failure."""

    @property
    def supervisors(self) -> dict[str, list[dict[str, Any]]]:
        folder = Path(self.config.run) / "supervisors"
        return {name: read_journal(folder / f"{name}.jsonl") for name in NAMES}

    @property
    def journal(self) -> list[dict[str, Any]]:
        return read_journal(Path(self.config.run) / "events.jsonl")

    def ledger(self) -> Ledger:
        return ledger(self.journal, self.supervisors)

    def endings(self) -> list[str]:
        """Why its rounds ended."""
        ends = [e for events in self.supervisors.values() for e in events if e["event"] == "round_ended"]
        return [reason for _, reason in sorted({(e["round"], e["reason"]) for e in ends})]


def live(config: TrainConfig, failures: Sequence[Failure], back_s: float, stop_s: float | None) -> Lived:
    """Run three nodes through their failures, until they are done or, after `stop_s`, asked to leave."""
    lived = Lived(config, [], [], [])
    with cluster(config) as nodes:
        lives = {name: nodes.start(name, *ARGUMENTS) for name in NAMES}
        nodes.wait(lambda: all(node.events("joined") for node in lives.values()), "first join")
        begin_s = max(node.events("joined")[0]["monotonic_s"] for node in lives.values())
        agenda: list[tuple[float, Failure | str]] = [(failure.at_s, failure) for failure in failures]
        while agenda:
            agenda.sort(key=lambda entry: entry[0])
            at_s, what = agenda.pop(0)
            while time.monotonic() < begin_s + at_s:
                time.sleep(0.01)
            if any(node.process.poll() == 0 for node in lives.values()):
                break
            if isinstance(what, str):
                lives[what] = _start_again(nodes, what, lived)
            elif lives[NAMES[what.node]].process.poll() is None:
                lived.loads.append(os.getloadavg()[0])
                _fail(lives[NAMES[what.node]], what.kind, lived)
                if what.kind == FailureKind.DEATH:
                    agenda.append((at_s + back_s, NAMES[what.node]))
        if stop_s is not None:
            time.sleep(max(0.0, begin_s + stop_s - time.monotonic()))
            for node in lives.values():
                node.process.send_signal(signal.SIGTERM)
        codes = {name: node.exit_code() for name, node in lives.items() if node.process.poll() != -9}
    wanted = 0 if stop_s is None else 75
    assert set(codes.values()) == {wanted}, f"exit codes {codes}, expected {wanted}"
    return lived


def _start_again(nodes: Cluster, name: str, lived: Lived) -> Node:
    begin_s = time.monotonic()
    node = nodes.start(name, *ARGUMENTS)

    def words() -> list[float]:
        return [e["monotonic_s"] for e in node.events("joined") if e["monotonic_s"] > begin_s]

    nodes.wait(lambda: bool(words()) or node.process.poll() is not None, "join")
    lived.boots_s += [word_s - begin_s for word_s in words()[:1]]
    return node


def _fail(node: Node, kind: FailureKind, lived: Lived) -> None:
    """Have it happen; a rank that is not there at the moment cannot fail."""
    if kind != FailureKind.DEATH:
        for pid in node.ranks().values():
            os.kill(pid, signal.SIGKILL if kind == FailureKind.CRASH else signal.SIGSTOP)
        return
    said_before = set(_reports(lived.config))
    at_s = time.time()
    node.kill()
    end_s = time.monotonic() + POLICY.lease_s
    while time.monotonic() < end_s:
        if new := set(_reports(lived.config)) - said_before:
            # It was said at the first look after, which is half the time between two looks later.
            lived.breaks_s.append(min(path.stat().st_mtime for path in new) - at_s - POLICY.look_s / 2)
            return
        time.sleep(0.01)


def _reports(config: TrainConfig) -> list[Path]:
    return sorted((Path(config.run) / "elastic" / "reports").glob("*/*.json"))


def costs_of(lived: Lived, nodes: int) -> Costs:
    """Means over the restarts of a run with so many nodes, from its journals."""
    rounds: dict[int, list[dict[str, Any]]] = {}
    for event in (event for events in lived.supervisors.values() for event in events if "round" in event):
        rounds.setdefault(event["round"], []).append(event)
    sizes = {number: _size(events) for number, events in rounds.items()}
    started = sorted((_last(events, "ranks_started"), n) for n, events in rounds.items() if sizes[n])
    taken = []
    for attempt in attempts_of(lived.journal):
        start_s = attempt.events[0][1]["monotonic_s"]
        begin_s, number = max(entry for entry in started if entry[0] < start_s)
        if sizes[number] == nodes and any(event["event"] == "first_step" for _, event in attempt.events):
            taken.append((begin_s, attempt))
    failed = [events for events in rounds.values() if any(e.get("reason") in FAILURES for e in events)]
    ends_s = [_last(events, "ranks_gone") - _last(events, "round_ended") for events in failed]
    return _means(taken, _mean(ends_s))


def _size(events: Sequence[dict[str, Any]]) -> int:
    """Members of a round; 0 when not all of them started its ranks."""
    nodes = max((len(event["nodes"]) for event in events if event["event"] == "round"), default=0)
    return nodes if sum(event["event"] == "ranks_started" for event in events) == nodes else 0


def _last(events: Sequence[dict[str, Any]], name: str) -> float:
    return max((event["monotonic_s"] for event in events if event["event"] == name), default=0.0)


def _means(taken: Sequence[tuple[float, AttemptSpan]], end_s: float) -> Costs:
    """Of attempts and the times at which the last launcher of each was started."""
    launch_s, restore_s, first_s, work = [], [], [], []
    stalls_s, lags_s = [], []
    for begin_s, attempt in taken:
        events = [event for _, event in attempt.events]
        start = events[0]
        first = next(event for event in events if event["event"] == "first_step")
        launch_s.append(start["monotonic_s"] - start["restore_s"] - begin_s)
        first_s.append(first["monotonic_s"] - start["monotonic_s"])
        if start["step"]:
            restore_s.append(start["restore_s"])
        stalls_s += [event["stall_s"] for event in events if event["event"] == "save"]
        lags_s += [event["seconds"] for event in events if event["event"] == "checkpoint"]
        work += [
            (
                after["monotonic_s"] - before["monotonic_s"] - after.get("stall_s", 0.0),
                after["step"] - before["step"],
            )
            for before, after in pairwise(e for e in events if e["event"] in ("first_step", "log", "save"))
        ]
    step_s = sum(seconds for seconds, _ in work) / max(1, sum(steps for _, steps in work))
    return Costs(
        step_s=step_s,
        save_stall_s=_mean(stalls_s),
        commit_lag_s=_mean(lags_s),
        launch_s=_mean(launch_s) + end_s,
        init_s=0.0,
        restore_s=_mean(restore_s),
        first_step_s=_mean(first_s) - step_s,
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else 0.0


def plan_of(seconds: float, seed: int) -> list[Failure]:
    """Failures of all kinds that leave a node where it is, or bring it back."""
    draws = random.Random(seed)
    found: list[Failure] = []
    at_s = draws.uniform(*GAP_S)
    kinds: list[FailureKind] = []
    while at_s < seconds:
        kinds = kinds or draws.sample(
            [FailureKind.CRASH, FailureKind.CRASH, FailureKind.STOP, FailureKind.DEATH], 4
        )
        found.append(Failure(at_s, draws.randrange(len(NAMES)), kinds.pop()))
        at_s += draws.uniform(*GAP_S)
    return found


def setup_of(run: Lived, steps: int = 1) -> SimulationSetup:
    """The simulation's, with what a run took."""
    costs = {nodes: replace(costs_of(run, nodes), break_s=_mean(run.breaks_s)) for nodes in (2, 3)}
    return SimulationSetup(
        3, steps, EVERY_STEPS, 0, costs[3], costs, POLICY, repair_s=BACK_S + _mean(run.boots_s)
    )


def steps_for(seconds: float, setup: SimulationSetup, failures: Sequence[Failure]) -> int:
    """How many steps make a run of about so long."""
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


def table(real: Ledger, foretold: SimulationResult) -> str:
    """Both ledgers, in seconds."""
    lines = [f"{'':18}{'real':>9}{'foretold':>10}"]
    for name, headings, uses in ROWS:
        real_s = sum(real.spent_us[heading] for heading in headings) / MICRO
        lines.append(f"{name:18}{real_s:9.1f}{sum(foretold.ledger_s[use] for use in uses):10.1f}")
    wall_s, goodput = outcome(real)
    foretold_wall_s, foretold_goodput = foretold.wall_s, _kept(foretold)
    lines.append(
        f"{'wall time':18}{wall_s:9.1f}{foretold_wall_s:10.1f}   {foretold_wall_s / wall_s - 1:+.1%}"
    )
    lines.append(
        f"{'goodput':18}{goodput:9.1%}{foretold_goodput:10.1%}   {foretold_goodput / goodput - 1:+.1%}"
    )
    return "\n".join(lines)


def _told(setup: SimulationSetup) -> str:
    lines = [
        f"  {nodes} nodes: " + ", ".join(f"{name} {value:.3g}" for name, value in asdict(costs).items())
        for nodes, costs in setup.measured.items()
    ]
    return "\n".join([*lines, f"  a supervisor is back after {setup.repair_s:.1f} s"])


def outcome(real: Ledger) -> tuple[float, float]:
    """Wall time in seconds, and the share of it that went into steps that count."""
    wall_us = real.end_us - real.begin_us
    return wall_us / MICRO, (real.spent_us[Heading.PRODUCTIVE] + real.spent_us[Heading.DATA]) / wall_us


def _kept(foretold: SimulationResult) -> float:
    return (foretold.ledger_s[Use.PRODUCTIVE] + foretold.ledger_s[Use.DEGRADED]) / foretold.wall_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="of the run that is foretold (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of its failures (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/prediction"), help="folder (runs/prediction)")
    args = parser.parse_args()
    out = args.out.absolute()
    measured = live(config_for(out / "measured", 10**6), MEASURING, MEASURING_BACK_S, MEASURING_S)
    setup, seconds = setup_of(measured), 60 * args.minutes
    print(f"measured:\n{_told(setup)}", flush=True)
    failures = plan_of(seconds - GAP_S[0], args.seed)
    setup = replace(setup, steps=steps_for(seconds, setup, failures))
    foretold = simulate(setup, failures)
    print("plan: " + ", ".join(f"{f.at_s:.0f} s {f.kind} {NAMES[f.node]}" for f in failures), flush=True)
    lived = live(config_for(out / "lived", setup.steps), failures, BACK_S, None)
    real = lived.ledger()
    print(table(real, foretold))
    print(f"rounds ended: {', '.join(lived.endings())}; foretold {dict(foretold.endings)}")
    loads = statistics.mean(measured.loads), statistics.mean(lived.loads)
    print(f"load {loads[0]:.1f} while measured, {loads[1]:.1f} while lived, on {os.cpu_count()} cores")
    print(f"what things took in that run:\n{_told(setup_of(lived))}")
    own = simulate(setup_of(lived, setup.steps), failures)
    print(f"foretold with these: wall time {own.wall_s:.1f} s, goodput {_kept(own):.1%}")
    (wall_s, goodput), (foretold_s, kept) = outcome(real), (foretold.wall_s, _kept(foretold))
    (out / "report.json").write_text(
        json.dumps({"real": [wall_s, goodput], "foretold": [foretold_s, kept], "loads": loads})
    )
    return int(abs(foretold_s / wall_s - 1) > LIMIT or abs(kept / goodput - 1) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
