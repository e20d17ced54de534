"""Run folders without a run: the files that `dit-scale status` and others read, written by hand."""

import json
import os
from pathlib import Path
from typing import Any

from dit_scale.config import TrainConfig, dump

NOW_S = 2000.0
CHECKPOINT = "0000000020-0001"


def event(at_s: float, kind: str, **details: Any) -> dict[str, Any]:
    return {"time_s": at_s, "monotonic_s": at_s, "event": kind, **details}


TRAINING = [
    event(1010.0, "start", attempt=1, step=0, restore_s=0.0),
    event(1012.0, "first_step", attempt=1, step=1, data_s=0.0),
    event(1031.0, "save", attempt=1, step=20, stall_s=0.0),
    event(1032.0, "checkpoint", attempt=1, step=21, name=CHECKPOINT),
    event(1041.0, "log", attempt=1, step=30, data_s=0.0),
]


def write_run(
    folder: Path, journal: list[dict[str, Any]], supervisor: list[dict[str, Any]], silence_s: float = 1.0
) -> str:
    """Write the folder of a run of 100 steps of 4 samples; its files are `silence_s` old at NOW_S."""
    config = {"run": str(folder), "steps": 100, "global_batch": 4, "log": {"every_steps": 10}}
    write(folder / "config.yaml", dump(TrainConfig.model_validate(config)))
    write(folder / "events.jsonl", lines(journal))
    write(folder / "metrics.jsonl", lines([{"step": 30, "images_per_s": 8.0}]) + '{"step": 4')
    if supervisor:
        write(folder / "supervisors" / "node0.jsonl", lines(supervisor))
    write(folder / "checkpoints" / CHECKPOINT / "MANIFEST.json", "")
    for path in folder.rglob("*"):
        os.utime(path, (NOW_S - silence_s,) * 2)
    return str(folder)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def lines(events: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(e) + "\n" for e in events)
