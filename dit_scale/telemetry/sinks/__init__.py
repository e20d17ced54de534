"""Mirrors of the record: W&B, TensorBoard and Trackio."""

import importlib.util
from pathlib import Path

from dit_scale.config import Mirrored, TrainConfig
from dit_scale.errors import ConfigError
from dit_scale.lines import Alarm
from dit_scale.telemetry.sinks.identity import run_id
from dit_scale.telemetry.sinks.mirror import Mirror
from dit_scale.telemetry.sinks.tensorboard_sink import TensorBoard
from dit_scale.telemetry.sinks.trackio_sink import Trackio
from dit_scale.telemetry.sinks.wandb_sink import wandb_mirror

INSTALL = {"trackio": "'dit-scale[trackio]', then pip install --no-deps trackio (it asks for another Pillow)"}
"""What to install where the name of the package does not say it."""


def check_installed(mirrored: Mirrored) -> None:
    """Raise ConfigError if the package of a requested mirror is missing."""
    wanted = {"wandb": mirrored.wandb != "off"}
    wanted |= {name: getattr(mirrored, name, False) for name in ("tensorboard", "trackio")}
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            value = mirrored.wandb if package == "wandb" else "true"
            what = INSTALL.get(package, package)
            raise ConfigError(f"{package}={value}: {package} is not installed; pip install {what}")


def open_mirrors(config: TrainConfig, resume_step: int | None, alarm: Alarm) -> list[Mirror]:
    """Open the mirrors that the configuration asks for.

    They continue after `resume_step`, or with None add to what they have.
    """
    folder, log, mirrors = Path(config.run), config.log, list[Mirror]()
    if log.wandb != "off":
        mirrors.append(
            wandb_mirror(
                folder,
                name=folder.name,
                run_id=run_id(folder),
                mirrored=log,
                config=config,
                alarm=alarm,
            )
        )
    if log.tensorboard:
        mirrors.append(Mirror("TensorBoard", lambda: TensorBoard(folder, resume_step), alarm))
    if log.trackio:
        tree = config.model_dump(mode="json")
        mirrors.append(
            Mirror("Trackio", lambda: Trackio(folder, log.trackio_project, run_id(folder), tree), alarm)
        )
    return mirrors
