"""metrics.jsonl of an encoding job, in its output: a row now and then of how far it is."""

import json
import time
from pathlib import Path

from dit_scale.config import EncodeConfig
from dit_scale.storage import MissingKeyError, Storage
from dit_scale.telemetry.sinks import Sink, Wandb, wandb_id_of

METRICS_KEY = "metrics.jsonl"


class Metrics:
    """The rows of all starts. The object is put whole again with each row, for S3 has no append.

    Making one puts it: an output that cannot be written to fails here.
    """

    def __init__(self, storage: Storage, config: EncodeConfig) -> None:
        self._storage = storage
        try:
            self._text = storage.read(METRICS_KEY)
        except MissingKeyError:
            self._text = b""
        storage.write(METRICS_KEY, self._text)
        self._mirrors: list[Sink] = []
        if config.wandb != "off":
            name = storage.url.rpartition("/")[2]
            run_id = wandb_id_of(storage.url)
            self._mirrors.append(Wandb(Path(), name, run_id, config, config.model_dump(mode="json")))

    def write(self, images: int, record: dict[str, float | None]) -> None:
        """A row: images done so far, over all starts, and other figures."""
        row = {"time_s": round(time.time(), 3), "images": images, **record}
        self._text += json.dumps(row).encode() + b"\n"
        self._storage.write(METRICS_KEY, self._text)
        for mirror in self._mirrors:
            mirror.write(images, record)

    def close(self) -> None:
        for mirror in self._mirrors:
            mirror.close()
