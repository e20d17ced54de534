"""metrics.jsonl of an encoding job, in its output: periodic rows with its progress."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from dit_scale.config import EncodeConfig
from dit_scale.errors import StorageError
from dit_scale.storage import MissingKeyError, Storage
from dit_scale.telemetry.sinks import check_installed
from dit_scale.telemetry.sinks.identity import id_of
from dit_scale.telemetry.sinks.mirror import Mirror
from dit_scale.telemetry.sinks.wandb_sink import wandb_mirror

METRICS_KEY = "metrics.jsonl"


class Metrics:
    """The rows of all attempts. Each row rewrites the whole object, because S3 cannot append.

    The constructor writes the object, so an output without write access fails there.
    """

    def __init__(self, storage: Storage, config: EncodeConfig, say: Callable[[str], None]) -> None:
        """`say` receives alarms: rows that cannot be written, or a broken mirror. The job continues."""
        check_installed(config)
        self._storage, self._say = storage, say
        self._problem = ""
        try:
            self._text = storage.read(METRICS_KEY)
        except MissingKeyError:
            self._text = b""
        storage.write(METRICS_KEY, self._text)
        self._mirrors: list[Mirror] = []
        if config.wandb != "off":
            name = storage.url.rpartition("/")[2]
            run_id = id_of(storage.url)
            self._mirrors.append(
                wandb_mirror(
                    Path(), name=name, run_id=run_id, mirrored=config, config=config, alarm=self._alarm
                )
            )

    def write(self, images: int, record: dict[str, float | None]) -> None:
        """Write a row: images done so far in all attempts, and other figures."""
        row = {"time_s": round(time.time(), 3), "images": images, **record}
        self._text += json.dumps(row).encode() + b"\n"
        self._save()
        for mirror in self._mirrors:
            mirror.write(images, record)

    def close(self) -> None:
        """Retry the rows that could not be written; never fail because of them."""
        if self._problem:
            self._save()
        for mirror in self._mirrors:
            mirror.close()

    def _save(self) -> None:
        try:
            self._storage.write(METRICS_KEY, self._text)
        except StorageError as error:
            if not self._problem:
                self._alarm(f"{error}; the job continues and retries with the next row")
            self._problem = str(error)
        else:
            self._problem = ""

    def _alarm(self, text: str) -> None:
        self._say(f"ALARM: {text}")
