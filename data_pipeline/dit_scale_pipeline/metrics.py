"""metrics.jsonl of an encoding job, in its output: a row now and then of how far it is."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from dit_scale.config import EncodeConfig
from dit_scale.errors import StorageError
from dit_scale.storage import MissingKeyError, Storage
from dit_scale.telemetry.sinks import Mirror, check_installed, wandb_id_of, wandb_mirror

METRICS_KEY = "metrics.jsonl"


class Metrics:
    """The rows of all starts. The object is put whole again with each row, for S3 has no append.

    Making one puts it: an output that cannot be written to fails here.
    """

    def __init__(self, storage: Storage, config: EncodeConfig, say: Callable[[str], None]) -> None:
        """`say` hears that rows cannot be put, or that a mirror broke; the job goes on."""
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
            run_id = wandb_id_of(storage.url)
            self._mirrors.append(
                wandb_mirror(
                    Path(), name=name, run_id=run_id, mirrored=config, config=config, alarm=self._alarm
                )
            )

    def write(self, images: int, record: dict[str, float | None]) -> None:
        """A row: images done so far, over all starts, and other figures."""
        row = {"time_s": round(time.time(), 3), "images": images, **record}
        self._text += json.dumps(row).encode() + b"\n"
        self._put()
        for mirror in self._mirrors:
            mirror.write(images, record)

    def close(self) -> None:
        """A last try; the rows of a job are no reason for it to fail."""
        if self._problem:
            self._put()
        for mirror in self._mirrors:
            mirror.close()

    def _put(self) -> None:
        try:
            self._storage.write(METRICS_KEY, self._text)
        except StorageError as error:
            if not self._problem:
                self._alarm(f"{error}; its rows are kept, and the job goes on")
            self._problem = str(error)
        else:
            self._problem = ""

    def _alarm(self, text: str) -> None:
        self._say(f"ALARM: {text}")
