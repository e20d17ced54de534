"""Record what Python code does to a folder, call by call, as the file system sees it.

The recorder wraps the functions of `os` that change files. It does not see other ways (the builtin `open`),
so its users compare `tests.support.faults.power_loss.Disk.tree` with the folder.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

Kind = Literal["create", "write", "sync", "link", "rename", "unlink", "mkdir", "rmdir", "sync folder"]


_NAMES = (
    "open",
    "close",
    "write",
    "fsync",
    "unlink",
    "remove",
    "rename",
    "replace",
    "link",
    "mkdir",
    "rmdir",
)
_REAL: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in _NAMES}


@dataclass(frozen=True)
class Call:
    """A system call that changed something, or made it durable."""

    kind: Kind
    path: str
    """Path below the recorded folder, which is "" itself; for an open file, where it was created."""
    target: str = ""
    """The other name of a link or rename."""
    data: bytes = b""
    """The written bytes."""
    file: int = -1
    """Number of the file among all created files: for create, write and sync."""


class Killed(BaseException):
    """The process is dead: it does nothing after this point."""


class Recorder:
    """Calls below a folder. The process dies before call number `kill_at`; None: never."""

    def __init__(self, folder: Path, kill_at: int | None = None) -> None:
        self.calls: list[Call] = []
        self._folder, self.kill_at = folder, kill_at
        self._files = 0
        self._open: dict[int, tuple[int, str]] = {}
        """Descriptor => number of its file (-1 for a folder), path."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Wrap the functions of `os`."""
        wrapped: dict[str, Callable[..., Any]] = {
            "open": self._open_file,
            "close": self._close,
            "write": self._write,
            "fsync": self._fsync,
            **{name: self._change(name, "unlink") for name in ("unlink", "remove")},
            **{name: self._change(name, "rename") for name in ("rename", "replace")},
            **{name: self._change(name, name) for name in ("link", "mkdir", "rmdir")},
        }
        with ExitStack() as stack:
            for name, function in wrapped.items():
                stack.enter_context(patch.object(os, name, function))
            yield

    def _live(self) -> None:
        if self.kill_at is not None and len(self.calls) >= self.kill_at:
            raise Killed

    def _below(self, path: Any) -> str | None:
        """Return the path below the folder; None for a path elsewhere."""
        if isinstance(path, int) or not Path(path).is_relative_to(self._folder):
            return None
        below = str(Path(path).relative_to(self._folder))
        return "" if below == "." else below

    def _open_file(self, path: Any, flags: int, *rest: Any, **more: Any) -> int:
        below, creates = self._below(path), flags & os.O_CREAT
        if below is None:
            return int(_REAL["open"](path, flags, *rest, **more))
        assert bool(creates) == bool(flags & os.O_EXCL) == bool(flags & (os.O_WRONLY | os.O_RDWR)), (
            "files are written when they are made, under a name of their own"
        )
        if creates:
            self._live()
        descriptor = int(_REAL["open"](path, flags, *rest, **more))
        if creates:
            self.calls.append(Call("create", below, file=self._files))
            self._open[descriptor] = (self._files, below)
            self._files += 1
        elif flags & os.O_DIRECTORY:
            self._open[descriptor] = (-1, below)
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        _REAL["close"](descriptor)

    def _write(self, descriptor: int, data: Any) -> int:
        if descriptor in self._open:
            self._live()
        written: int = _REAL["write"](descriptor, data)
        if descriptor in self._open:
            file, path = self._open[descriptor]
            self.calls.append(Call("write", path, data=bytes(data[:written]), file=file))
        return written

    def _fsync(self, descriptor: int) -> None:
        if descriptor in self._open:
            self._live()
        _REAL["fsync"](descriptor)
        if descriptor in self._open:
            file, path = self._open[descriptor]
            self.calls.append(Call("sync", path, file=file) if file >= 0 else Call("sync folder", path))

    def _change(self, name: str, kind: Kind) -> Callable[..., Any]:
        """Wrap a function that takes one path, or two."""

        def call(path: Any, *rest: Any, **more: Any) -> Any:
            below = self._below(path)
            if below is not None:
                self._live()
            answer = _REAL[name](path, *rest, **more)
            if below is not None:
                target = self._below(rest[0]) if kind in ("link", "rename") else ""
                assert target is not None, "a rename must stay in the folder"
                self.calls.append(Call(kind, below, target))
            return answer

        return call
