"""Mirrors of the record: W&B and TensorBoard. The only module that imports them."""

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from pydantic import BaseModel

from dit_scale.config import Mirrored, TrainConfig
from dit_scale.errors import ConfigError
from dit_scale.lines import Alarm

FINISH_S = 60.0
"""Longest wait for wandb's uploads at the end of a run; the rest stays on disk for `wandb sync`."""

_WANDB_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")
"""Name of a wandb folder: the time when it was created, and the id of the run."""


class Sink(Protocol):
    """Receives named numbers and pictures; None stands for a mean over nothing."""

    def write(self, step: int, record: dict[str, float | None]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class Mirror:
    """A sink that may fail at any time: that costs one alarm, and the run continues without it."""

    def __init__(self, name: str, make: Callable[[], Sink], alarm: Alarm) -> None:
        self._name, self._alarm = name, alarm
        self._sink: Sink | None = None
        with self._guarded("failed to start"):
            self._sink = make()

    def write(self, step: int, record: dict[str, float | None]) -> None:
        if self._sink is not None:
            with self._guarded("failed"):
                self._sink.write(step, record)

    def picture(self, step: int, name: str, path: Path) -> None:
        if self._sink is not None:
            with self._guarded("failed"):
                self._sink.picture(step, name, path)

    def close(self) -> None:
        if self._sink is not None:
            with self._guarded("failed to finish"):
                self._sink.close()
            self._sink = None

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # third-party code may raise anything
            self._sink = None
            text = str(error) or type(error).__name__
            self._alarm(f"{self._name} {what} and gets no more rows; metrics.jsonl has all of them: {text}")


class Wandb:
    """A W&B run with its files in a folder, resumed under the same id."""

    def __init__(
        self, folder: Path, name: str, run_id: str, mirrored: Mirrored, config: dict[str, Any]
    ) -> None:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # otherwise it waits for a key on a terminal
        self._run = wandb.init(
            project=mirrored.wandb_project,
            name=name,
            id=run_id.strip("/").replace("/", "-"),
            dir=str(folder),
            mode=mirrored.wandb,  # type: ignore[arg-type]
            resume="allow",
            config=config,
            settings=wandb.Settings(silent=True, finish_timeout=FINISH_S, finish_timeout_raises=True),
        )

    def write(self, step: int, record: dict[str, float | None]) -> None:
        self._run.log(record, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, record: dict[str, float | None]) -> None:
        for name, value in record.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def check_installed(mirrored: Mirrored) -> None:
    """Raise ConfigError if the package of a requested mirror is missing."""
    wanted = {"wandb": mirrored.wandb != "off", "tensorboard": getattr(mirrored, "tensorboard", False)}
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            value = mirrored.wandb if package == "wandb" else "true"
            raise ConfigError(f"{package}={value}: {package} is not installed; pip install {package}")


def open_mirrors(config: TrainConfig, resume_step: int, alarm: Alarm) -> list[Mirror]:
    """Open the mirrors that the configuration asks for."""
    folder, mirrors = Path(config.run), list[Mirror]()
    if config.log.wandb != "off":
        mirrors.append(
            wandb_mirror(
                folder,
                name=folder.name,
                run_id=wandb_id(folder),
                mirrored=config.log,
                config=config,
                alarm=alarm,
            )
        )
    if config.log.tensorboard:
        mirrors.append(Mirror("TensorBoard", lambda: TensorBoard(folder, resume_step), alarm))
    return mirrors


def wandb_mirror(
    folder: Path, *, name: str, run_id: str, mirrored: Mirrored, config: BaseModel, alarm: Alarm
) -> Mirror:
    """Open a mirror on W&B, see `Wandb`."""
    tree = config.model_dump(mode="json")
    return Mirror("wandb", lambda: Wandb(folder, name, run_id, mirrored, tree), alarm)


def wandb_id(folder: Path) -> str:
    """Return the W&B id of the run in this folder, even if it has moved; if it has none, a new one."""
    known = (_WANDB_FOLDER.fullmatch(path.name) for path in (folder / "wandb").glob("*run-*"))
    if created := sorted(match.groups() for match in known if match):
        return str(created[-1][1])
    return wandb_id_of(os.path.abspath(folder))


def wandb_id_of(place: str) -> str:
    """Return a unique W&B id for this path or URL."""
    digest = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_.]+", "-", place).strip("-")[-100:] + f"-{digest}"
