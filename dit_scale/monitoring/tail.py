"""Reads each line of a growing JSON-lines file once."""

import os
from pathlib import Path
from typing import Any

from dit_scale.lines import parse_object


class Tail:
    """The objects in a file of JSON lines that others append to, or replace."""

    def __init__(self, path: Path, *keys: str) -> None:
        """Lines that do not parse, or lack one of the keys, count as never written."""
        self._path, self._keys = path, keys
        self._file: tuple[int, int] | None = None
        self._end_bytes = 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the objects that are new since the last call, and whether earlier ones are void.

        They are void if the file was replaced: then all of its objects are new. Half a line at the end is
        left for the next call. Without a file, nothing is new. Raises OSError if it cannot be read.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return [], False
        with open(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            named = (status.st_dev, status.st_ino)
            is_other = self._file is not None and (named != self._file or status.st_size < self._end_bytes)
            if is_other:
                self._end_bytes = 0
            self._file = named
            if status.st_size == self._end_bytes:
                return [], is_other
            opened.seek(self._end_bytes)
            data = opened.read(status.st_size - self._end_bytes)
        complete = data[: data.rfind(b"\n") + 1]
        self._end_bytes += len(complete)
        lines = complete.decode(errors="replace").splitlines()
        found = (parse_object(line, *self._keys) for line in lines)
        return [value for value in found if value is not None], is_other
