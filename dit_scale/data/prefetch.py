"""A thread that reads micro-batches ahead of their consumer."""

import queue
import threading
from collections.abc import Iterator

from dit_scale.data.micro_batch import MicroBatch


class Prefetch:
    """Runs an endless iterator in a thread, at most `depth` micro-batches ahead of `next`."""

    def __init__(self, batches: Iterator[MicroBatch], depth: int) -> None:
        self._batches = batches
        self._queue: queue.Queue[MicroBatch | Exception] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def next(self, timeout_s: float) -> MicroBatch | None:
        """Return the next micro-batch, or None after `timeout_s`. Raises the error of its read."""
        try:
            item = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        """Tell the thread to stop after the current read."""
        self._stopping.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            for batch in self._batches:
                if not self._put(batch):
                    return
        except Exception as error:  # raised in the consumer
            self._put(error)

    def _put(self, item: MicroBatch | Exception) -> bool:
        """Put an item into the queue, waiting for room. Returns False if the thread must stop."""
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
