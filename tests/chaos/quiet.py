"""Ten thousand fast steps with slow ones in between; supervisors must not mistake them for hangs.

    make chaos
    python -m tests.chaos.quiet --steps 10000 --out runs/quiet

Some steps, log points and snapshots are slow (1 to 6 s; a step may take 10 s), some reads of data (9 to 15
s), and every commit (12 s), including the last one. `tests.support.nodes.faulty` sets the shares. Exits with
1 when this ends a round, or when hardly anything was slow. OUT/report.json lists every wait.
"""

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from dit_scale.config import TrainConfig
from tests.support.nodes.faulty import SLOW
from tests.support.nodes.nodes import Node, cluster, config_of

SAVES = 5
LOGS = 100
WITHIN_S = 3600.0
MIN_WAITS = 10
"""About forty in 10,000 steps."""


def quiet(steps: int, out: Path) -> dict[str, Any]:
    """The run of two nodes with one rank each, and its result."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    begin_s = time.monotonic()
    with cluster(_config(out, steps)) as nodes:
        members = [nodes.start(name, "--nodes", "2", "--lease-s", "3", fault="slow") for name in "ab"]
        codes = [node.exit_code(WITHIN_S) for node in members]
    first = members[0]
    return {
        "steps": steps,
        "seconds": round(time.monotonic() - begin_s, 1),
        "codes": codes,
        "endings": first.endings(),
        "texts": [event["text"] for event in first.events("round_ended")],
        "slow_s": {
            kind: sorted(wait_s for node in members for wait_s in _waits(node, kind)) for kind in SLOW
        },
    }


def _config(out: Path, steps: int) -> TrainConfig:
    """Return the configuration with the shortest possible step: one sample per rank, one average."""
    config = config_of(out, steps, every_steps=steps // SAVES)
    log = config.log.model_copy(update={"every_steps": steps // LOGS})
    engine = config.engine.model_copy(update={"micro_batch": 1})
    return config.model_copy(update={"global_batch": 2, "ema": config.ema[:1], "log": log, "engine": engine})


def _waits(node: Node, kind: str) -> list[float]:
    return [float(text) for text in re.findall(rf"slow {kind} ([\d.]+)", node.log.read_text())]


def problems(report: dict[str, Any]) -> list[str]:
    found = []
    if any(report["codes"]):
        found.append(f"exit codes {report['codes']}, expected 0")
    if [reason for reason, _ in report["endings"]] != ["done"]:
        found.append(f"the rounds ended with {report['texts']}, expected one that finished the run")
    num_waits = sum(len(waits) for waits in report["slow_s"].values())
    if num_waits < MIN_WAITS * report["steps"] / 10_000:
        found.append(f"only {num_waits} slow operations in {report['steps']} steps")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the run (default 10000)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quiet"), help="output folder (default runs/quiet)"
    )
    args = parser.parse_args()
    report = quiet(args.steps, args.out.absolute())
    (args.out / "report.json").write_text(json.dumps(report, indent=1))
    print(f"{report['steps']} steps in {report['seconds']:.0f} s, {len(report['endings']) - 1} false alarms")
    for kind, waits_s in report["slow_s"].items():
        longest_s = max(waits_s, default=0.0)
        print(f"  slow {kind:9}{len(waits_s):4}, {sum(waits_s):6.1f} s in total, longest {longest_s:4.1f} s")
    found = problems(report)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
