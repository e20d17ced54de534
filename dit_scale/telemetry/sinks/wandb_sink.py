"""Mirror on Weights & Biases. The only module that imports wandb."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dit_scale.config import Mirrored
from dit_scale.lines import Alarm
from dit_scale.telemetry.sinks.mirror import Mirror

FINISH_S = 60.0
"""Longest wait for wandb's uploads at the end of a run; the rest stays on disk for `wandb sync`."""


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
            resume="allow",  # offline, each attempt writes its own file under the same id
            config=config,
            settings=wandb.Settings(silent=True, finish_timeout=FINISH_S, finish_timeout_raises=True),
        )

    def write(self, step: int, record: dict[str, float | None]) -> None:
        self._run.log(record, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path))}, step=step)

    def scores(self, step: int, figures: dict[str, float | None]) -> None:
        """Put figures into the summary: the server ignores rows of earlier steps."""
        self._run.summary.update(figures)

    def close(self) -> None:
        self._run.finish()


def wandb_mirror(
    folder: Path, *, name: str, run_id: str, mirrored: Mirrored, config: BaseModel, alarm: Alarm
) -> Mirror:
    """Open a mirror on W&B, see `Wandb`."""
    tree = config.model_dump(mode="json")
    return Mirror("wandb", lambda: Wandb(folder, name, run_id, mirrored, tree), alarm)
