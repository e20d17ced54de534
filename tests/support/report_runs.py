"""Run folders as `dit-scale report` reads them: small ones, and texts that try to break the page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_scale.config import TrainConfig, dump
from dit_scale.sealed import sealed

HOSTILE = "<img src=x onerror=alert(1)>"
BREAKOUT = "</script><script>alert(2)</script><!--"
"""Would end a script element if it were not escaped."""


def event(at_s: float, kind: str, **details: Any) -> dict[str, Any]:
    return {"time_s": at_s, "monotonic_s": at_s, "event": kind, **details}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


START = event(1010.0, "start", attempt=1, step=0, restore_s=0.0, world=2, attention="sdpa")
JOURNAL = [
    START,
    event(1012.0, "first_step", attempt=1, step=1, data_s=0.0),
    event(1040.0, "log", attempt=1, step=30, data_s=0.5),
    event(1070.0, "start", attempt=2, step=20, restore_s=0.5, world=2),
    event(1072.0, "first_step", attempt=2, step=21, data_s=0.0),
    event(1090.0, "alarm", attempt=2, step=40, text=f"the disk is full {HOSTILE}"),
]
SUPERVISOR = [
    event(1000.0, "round", round=1, nodes=["node0", "node1"]),
    event(
        1050.0,
        "round_ended",
        round=1,
        reason="failed",
        failed_node="node1",
        text=BREAKOUT,
        details={"rank": 3},
    ),
    event(1051.0, "ranks_gone", round=1),
    event(1060.0, "round", round=2, nodes=["node0"]),
]
ROWS = [
    {"step": 10, "loss": 1.0, "images_per_s": 8.0, "mfu": 0.25},
    {"step": 20, "loss": 0.5, "images_per_s": 8.0, "mfu": 0.375},
    {"step": 20, "eval_loss_ema.paper": 0.625, "eval_loss_raw": 0.75},
]


def write_run(
    folder: Path, journal: Any = JOURNAL, supervisor: Any = SUPERVISOR, rows: Any = ROWS, **keys: Any
) -> str:
    """Write the folder of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "run": str(folder),
        "steps": 100,
        "global_batch": 4,
        "evaluate": {"every_steps": 10, "held_out": 0.1},
        **keys,
    }
    (folder / "config.yaml").write_text(dump(TrainConfig.model_validate(config)))
    (folder / "events.jsonl").write_text(lines(journal))
    (folder / "metrics.jsonl").write_text(lines(rows))
    (folder / "supervisors").mkdir(exist_ok=True)
    (folder / "supervisors" / "node0.jsonl").write_text(lines(supervisor))
    return str(folder)


def write_card(run: str, value: float, step: int | None = None, where: str = "samples") -> Path:
    """Write a score card of samples, with one row of the paper; without a step, their protocol is unknown."""
    tree = {
        "format": "dit-scale metrics",
        "version": 1,
        "samples": {"protocol": step and {"weights": {"step": step}}},
        "results": [
            {
                "metric": "FID",
                "network": "inception",
                "value": value,
                "samples": 500,
                "standard_error": 0.25,
                "note": "",
            }
        ],
        "cautions": ["500 samples are few"],
        "paper": [{"row": "400K steps, no guidance", "FID": 19.47}],
    }
    path = Path(run) / where / "metrics.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(sealed(tree))
    return path


def write_grid(run: str, step: int, side: int = 64, seed: int = 0, profile: str = "paper") -> None:
    """Write the grid of an evaluation: noise, which compresses badly."""
    pixels = np.random.default_rng(seed + step).integers(0, 256, (side, side, 3), np.uint8)
    (Path(run) / "evaluations").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(Path(run) / "evaluations" / f"{step:010d}.{profile}.png")
