"""Where measurements go: metrics.jsonl is the record; wandb and TensorBoard mirror it.

The one door to wandb and TensorBoard. On resume, lines of steps that will be taken again are
dropped from the record, so that it reads as one unbroken run.
"""

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Protocol

from dit_scale.config import Mirrored, TrainConfig
from dit_scale.errors import ConfigError

_WANDB_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")
"""When it was begun, and the run's id."""


class Sink(Protocol):
    """Takes one record of named numbers at a step; None where all steps of a window were skipped."""

    def write(self, step: int, record: dict[str, float | None]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl, one object per log point, each line whole on disk before the next step."""

    def __init__(self, path: Path, resume_step: int) -> None:
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) in range(resume_step + 1)]
            tmp = path.with_suffix(".tmp")
            tmp.write_text("".join(f"{line}\n" for line in kept))
            os.replace(tmp, path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, record: dict[str, float | None]) -> None:
        self._file.write(json.dumps({"step": step, **record}) + "\n")

    def close(self) -> None:
        self._file.close()


class Wandb:
    """A Weights & Biases run with its files in a folder; resumed under the same id."""

    def __init__(
        self, folder: Path, name: str, run_id: str, mirrored: Mirrored, config: dict[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(f"wandb={mirrored.wandb}: wandb is not installed; pip install wandb") from None
        self._run = wandb.init(
            project=mirrored.wandb_project,
            name=name,
            id=run_id.strip("/").replace("/", "-"),
            dir=str(folder),
            mode=mirrored.wandb,  # type: ignore[arg-type]
            resume="allow",
            config=config,
            settings=wandb.Settings(silent=True),
        )

    def write(self, step: int, record: dict[str, float | None]) -> None:
        self._run.log(record, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "log.tensorboard: tensorboard is not installed; pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, record: dict[str, float | None]) -> None:
        for name, value in record.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def open_sinks(folder: Path, config: TrainConfig, resume_step: int) -> list[Sink]:
    """The record and the mirrors that the configuration asks for."""
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl", resume_step)]
    if config.log.wandb != "off":
        resolved = config.model_dump(mode="json")
        sinks.append(Wandb(folder, folder.name, wandb_id(folder), config.log, resolved))
    if config.log.tensorboard:
        sinks.append(TensorBoard(folder, resume_step))
    return sinks


def wandb_id(folder: Path) -> str:
    """The id under which the run in this folder began, also if it has moved since; a new one of its path."""
    known = (_WANDB_FOLDER.fullmatch(path.name) for path in (folder / "wandb").glob("*run-*"))
    if begun := sorted(match.groups() for match in known if match):
        return str(begun[-1][1])
    return wandb_id_of(os.path.abspath(folder))


def wandb_id_of(place: str) -> str:
    """An id for what lies at this path or url, unlike that of anything else."""
    digest = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_.]+", "-", place).strip("-")[-100:] + f"-{digest}"


class Journal:
    """events.jsonl: what happened to the run, append-only; the half line of a killed writer is cut off.

    Two clocks stand in each line: that of the wall, which may jump, and that of the node since its start.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        whole_bytes = path.read_bytes().rfind(b"\n") + 1
        if whole_bytes < path.stat().st_size:
            self._file.truncate(whole_bytes)

    def write(self, event: str, **details: Any) -> None:
        clocks = {"time_s": time.time(), "monotonic_s": round(time.monotonic(), 6)}
        self._file.write(json.dumps({**clocks, "event": event, **details}) + "\n")

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> int:
    """The step of a line; a torn last line, cut off by a kill, counts as never written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
