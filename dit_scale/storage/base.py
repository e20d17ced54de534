"""What a storage does, whatever it is made of."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from dit_scale.errors import StorageError


class MissingKeyError(StorageError):
    """There is nothing under this key."""


class DiskFullError(StorageError):
    """A disk or a quota is full: somebody may make room."""


class UnavailableError(StorageError):
    """The storage gave no answer, or none that tells what is there."""


class Storage(ABC):
    """A flat space of immutable-by-habit objects; every method raises StorageError."""

    url: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object; MissingKeyError when there is none."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`; an object that ends earlier is an error."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put the object, replacing what is there; durable when this returns."""

    @abstractmethod
    def write_stream(self, key: str, chunks: Iterable[memoryview], size: int) -> None:
        """Put an object of `size` bytes from its pieces in order, without holding it in memory.

        Like `write` otherwise; when the pieces do not add up to `size`, nothing appears under the key.
        """

    @abstractmethod
    def write_new(self, key: str, data: bytes) -> bool:
        """Put the object only if the key is free; of many writers exactly one gets True."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether the key holds an object."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of the object; MissingKeyError when there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """(key, bytes) of every object whose key starts with `prefix`, sorted by key."""

    def leftovers(self, prefix: str = "") -> Sequence[str]:
        """What killed writers left under this prefix and `list` does not show, as keys to delete."""
        return ()

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; a key that holds nothing is fine."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where the object lies on this machine's file systems; None when it is remote."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def check_key(key: str) -> str:
    """The key itself. Raises StorageError for one that could leave its storage."""
    if not key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"key {key!r}: expected a relative path without empty parts, '.' or '..'")
    return key


def check_complete(got: int, expected: int, where: str) -> None:
    """Raises StorageError unless that many bytes came as were expected."""
    if got != expected:
        raise StorageError(
            f"{where}: expected {expected} bytes, got {got}; the object is shorter than it was"
        )
