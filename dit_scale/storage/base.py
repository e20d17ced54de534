"""The interface of every storage."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from dit_scale.errors import StorageError


class MissingKeyError(StorageError):
    """No object has this key."""


class DiskFullError(StorageError):
    """A disk or a quota is full: a later write may succeed once there is room."""


class UnavailableError(StorageError):
    """The storage did not answer, or its answer does not tell whether the object exists."""


class Storage(ABC):
    """A flat space of objects, immutable by convention; every method raises StorageError."""

    url: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Read the object; MissingKeyError if there is none."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Read exactly `length` bytes from `start`; StorageError if the object ends earlier."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write the object, replacing any existing one; durable when this returns."""

    @abstractmethod
    def write_stream(self, key: str, chunks: Iterable[memoryview], size: int) -> None:
        """Write an object of `size` bytes from its chunks in order, without holding it in memory.

        Otherwise like `write`. If the chunks do not add up to `size`, nothing appears under the key.
        """

    @abstractmethod
    def write_new(self, key: str, data: bytes) -> bool:
        """Write the object only if the key is free; exactly one of several writers gets True."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether an object has this key."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Size of the object in bytes; MissingKeyError if there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """List (key, size in bytes) of every object whose key starts with `prefix`, sorted by key."""

    def leftovers(self, prefix: str = "") -> Sequence[str]:
        """List the keys of files that killed writers left under this prefix; `list` hides them."""
        return ()

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete the object; succeeds if there is none."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Path of the object on this machine's file systems; None if the storage is remote."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def check_key(key: str) -> str:
    """Return the key. Raises StorageError if it could point outside its storage."""
    if not key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"key {key!r}: expected a relative path without empty parts, '.' or '..'")
    return key


def check_complete(got: int, expected: int, where: str) -> None:
    """Raise StorageError unless all expected bytes arrived."""
    if got != expected:
        raise StorageError(f"{where}: expected {expected} bytes, got {got}; the object is truncated")
