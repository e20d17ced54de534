"""The encoder actors of a job: which are ready, which are loading, and which gets the next batch."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dit_scale.config import EncodeConfig
from dit_scale.errors import DeviceError
from dit_scale_pipeline.ray_cluster import LostError, living_nodes, max_encoders
from dit_scale_pipeline.tasks import EncodeBatch, EncodeTask, LoadTask, TasksInFlight

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

BATCHES_PER_ENCODER = 2
"""VAE batches submitted to an encoder at a time: one in progress, one waiting."""
MAX_LOADS = 5
"""Consecutive restarts of an encoder whose VAE does not load."""
BACKUP_S = 120.0
"""Age at which a batch is also submitted to an idle encoder, because the first may be lost."""


class EncoderPool:
    """Encoders by number. An encoder is ready once its VAE is loaded on the right kind of device."""

    def __init__(
        self,
        config: EncodeConfig,
        actors: "Sequence[ActorHandle]",
        runtime: dict[str, str],
        tasks: TasksInFlight,
    ) -> None:
        self._config, self._actors, self._runtime, self._tasks = config, actors, runtime, tasks
        self._ready: set[int] = set()
        for number in range(len(actors)):
            self._load(number)

    def __len__(self) -> int:
        """Return the number of encoders, ready or not."""
        return len(self._actors)

    @property
    def num_ready(self) -> int:
        """Number of encoders that have loaded their VAE."""
        return len(self._ready)

    def mark_ready(self, encoder: int, runtime: dict[str, str]) -> None:
        """Accept an encoder whose VAE is loaded; DeviceError when its latents would differ."""
        if runtime != self._runtime:
            raise DeviceError(
                f"an encoder runs on a different device or library version: {runtime}, the data set is made "
                f"with {self._runtime}"
            )
        self._ready.add(encoder)

    def batch_failed(self, encoder: int, error: Exception) -> None:
        """Wait until an encoder that lost a batch is ready again; restart it unless Ray has done so."""
        if encoder not in self._ready:
            return
        self._ready.remove(encoder)
        if isinstance(error, LostError):
            self._load(encoder)
        else:  # after a CUDA error the process cannot be used any more
            self.load_failed(encoder, 1, error)

    def load_failed(self, encoder: int, failures: int, error: Exception) -> None:
        """Restart an encoder, perhaps on another node; give it up after MAX_LOADS if others remain."""
        import ray

        if failures <= MAX_LOADS:
            ray.kill(self._actors[encoder], no_restart=False)
            self._load(encoder, failures)
        elif not self._ready and not self._tasks.count(LoadTask):
            raise error

    def num_to_drop(self) -> int:
        """Return how many encoders must stop so that a decoder fits; 0 while batches are being encoded."""
        device = "cpu" if self._runtime["device"].startswith("cpu") else "cuda"
        most = max(1, max_encoders(self._config, device, living_nodes()))
        return 0 if self._tasks.encoding() else max(0, len(self._in_use()) - most)

    def drop(self, count: int) -> None:
        """Stop encoders for good. Those that wait for room go first: they would take it again."""
        import ray

        dropped = self._in_use()[-count:]
        loading = self._tasks.loading()
        for number in dropped:
            ray.kill(self._actors[number], no_restart=True)
            self._ready.discard(number)
        for result, number in loading.items():
            if number in dropped:
                self._tasks.pop(result)

    def free_slots(self) -> int:
        """Return how many batches can be submitted now."""
        return sum(max(0, BATCHES_PER_ENCODER - count) for count in self._queued().values())

    def submit(self, batch: EncodeBatch, pixels: "ObjectRef", *, is_backup: bool = False) -> None:
        """Submit a batch to the ready encoder with the fewest batches."""
        queued = self._queued()
        number = min(queued, key=lambda encoder: queued[encoder])
        # Ray would retry in the same actor, for which there may be no room any more.
        encode: Any = self._actors[number].encode.options(name="encode", max_task_retries=0)
        moments = encode.remote(pixels, self._runtime)
        self._tasks.add(moments, EncodeTask(batch, pixels, number, time.monotonic(), is_backup))

    def submit_backups(self) -> None:
        """Submit overdue batches to idle encoders as well; the first result counts."""
        overdue_s = time.monotonic() - BACKUP_S
        for task in self._tasks.encoding():
            if task.submitted_s < overdue_s and not task.is_backup and 0 in self._queued().values():
                self.submit(task.batch, task.pixels, is_backup=True)

    def _load(self, encoder: int, failures: int = 0) -> None:
        """Have an encoder report that its VAE is loaded; Ray restarts its process where there is room."""
        self._tasks.add(self._actors[encoder].runtime.remote(), LoadTask(encoder, failures))

    def _in_use(self) -> list[int]:
        return [*sorted(self._ready), *self._tasks.loading().values()]

    def _queued(self) -> dict[int, int]:
        """Return the number of batches at each ready encoder."""
        queued = dict.fromkeys(sorted(self._ready), 0)
        for task in self._tasks.encoding():
            if task.encoder in queued:
                queued[task.encoder] += 1
        return queued
