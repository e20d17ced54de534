"""A thread that fetches into the node's cache what the loader will read next.

Nothing waits for it: samples of a shard that is not cached are read from the storage one by one. The
processes of a node share the work: each skips what another one is fetching.
"""

import threading
from collections.abc import Callable

from dit_scale.data.cache import NoRoomError
from dit_scale.data.files import ShardFiles
from dit_scale.errors import DataError, StorageError

LOOK_AGAIN_S = 5.0
"""Pause before shards that could not be fetched, or were dropped from the cache, are tried again."""
PATIENCE = 3
"""Failures in a row before they are reported: other processes may soon release shards for eviction."""


class Downloader:
    """Fills the cache with the wanted shards, in order. Reports failures to `say` once."""

    def __init__(self, files: ShardFiles, say: Callable[[str], None]) -> None:
        self._files, self._say = files, say
        self._wanted: tuple[int, ...] = ()
        self._given_up: set[int] = set()
        self._failures, self._said = 0, False
        self._changed, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="downloader", daemon=True)
        self._thread.start()

    def want(self, shards: tuple[int, ...]) -> bool:
        """Fetch these shards from now on, in order. Returns False if they are wanted already.

        They are not evicted to make room for each other.
        """
        if shards is self._wanted:
            return False
        self._wanted = shards
        self._changed.set()
        return True

    def close(self, timeout_s: float) -> None:
        """Stop after the current request, waiting at most `timeout_s` for it."""
        self._closing.set()
        self._changed.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._changed.wait(LOOK_AGAIN_S)
            self._changed.clear()
            try:
                self._fetch_wanted()
            except (NoRoomError, StorageError) as error:
                self._failed(error)
            else:
                self._failures = 0

    def _fetch_wanted(self) -> None:
        """Fetch until all wanted shards are cached, or other shards are wanted."""
        wanted, cache = self._wanted, self._files.cache
        keep = [self._files.shards[shard] for shard in wanted]
        for shard, file in zip(wanted, keep, strict=True):
            if self._changed.is_set():
                return
            if shard in self._given_up or cache.holds(file):
                continue
            try:
                cache.fetch(file, keep, self._closing)
            except NoRoomError:
                raise
            except DataError as error:
                self._given_up.add(shard)
                self._say(str(error))

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures >= PATIENCE and not self._said:
            self._said = True
            self._say(f"{error}. Samples that are not cached are read from the storage one by one")
