"""Tar archives read in place: iterate over the members, or read one by its offset.

Nothing is unpacked. Listing reads headers through a window. The window is small on a disk, to skip the data
between two headers, and large on S3, where a request costs more than the bytes of many images.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from dit_scale.errors import DataError, StorageError
from dit_scale.storage import DiskStorage, MissingKeyError, Storage
from dit_scale_pipeline.inputs.base import Entry
from dit_scale_pipeline.inputs.contents import HEAD_BYTES, describe_file
from dit_scale_pipeline.inputs.ranged import buffered

DISK_WINDOW_BYTES = 4 * 2**10
REMOTE_WINDOW_BYTES = 4 * 2**20

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar."""

    name: str
    """Path that unpacking would create."""
    start: int
    """Offset of its headers in the object that contains the tar."""
    data_start: int
    size: int
    """Size of its data."""

    @property
    def span(self) -> int:
        """Size of its headers and data."""
        return self.data_start + self.size - self.start


class Tar:
    """A tar in bytes `start` to `end` of the object `key`."""

    def __init__(
        self, storage: Storage, key: str, start: int, end: int, window_bytes: int | None = None
    ) -> None:
        self._where = f"{storage.url}/{key}"
        self._start, self._length = start, end - start
        default = DISK_WINDOW_BYTES if isinstance(storage, DiskStorage) else REMOTE_WINDOW_BYTES
        self._file = buffered(storage, key, start, end, window_bytes or default)

    def __iter__(self) -> Iterator[TarMember]:
        """Yield the regular members; DataError when the tar is damaged or contains links or devices."""
        headers, at = _Headers(self._file), 0
        while self._more(at):
            try:
                info = headers.next_at(at)
            except ValueError as error:
                raise self._no_header(at, error) from None
            try:
                name = _safe(info.name)
            except ValueError as error:
                raise DataError(
                    f"{self._where}: the member at byte {self._start + at} would unpack outside the target "
                    f"folder ({error}). Create the archive again from inside its folder (tar -C FOLDER)"
                ) from None
            if not info.isdir():
                yield self._member(info, name, at)
            at = _end(info)

    def data(self, member: TarMember) -> bytes:
        """Return the bytes of the member that was yielded last."""
        self._file.seek(member.data_start - self._start)
        return self._file.read(member.size)

    def _more(self, at: int) -> bool:
        """Whether another header follows; False at the end mark, after which only zeros may follow."""
        self._file.seek(at)
        block = self._file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise self._damaged(at, "expected a member or the end mark, but the archive ends")
        if block.strip(b"\0"):
            return True
        while rest := self._file.read(REMOTE_WINDOW_BYTES):
            if rest.strip(b"\0"):
                raise DataError(
                    f"{self._where}: expected only zeros after the end mark at byte {self._start + at}. If "
                    "several archives were concatenated, separate them; otherwise the archive is damaged, "
                    "copy it again"
                )
        return False

    def _member(self, info: tarfile.TarInfo, name: str, at: int) -> TarMember:
        if not _is_plain(info):
            raise DataError(
                f"{self._where}: {info.name!r} at byte {self._start + at} is a link, a device or a sparse "
                "file; expected regular files and folders. Create the archive again with the file contents "
                "(tar --dereference --hard-dereference)"
            )
        if info.offset_data + info.size > self._length:
            raise self._damaged(
                at,
                f"expected {info.size} bytes of {info.name!r}, but the archive ends "
                f"{info.offset_data + info.size - self._length} bytes too early",
            )
        start = self._start + info.offset
        return TarMember(name, start, self._start + info.offset_data, info.size)

    def _no_header(self, at: int, error: ValueError) -> DataError:
        """Return the error for bytes that are not a member header."""
        self._file.seek(at)
        what = "" if at else describe_file(self._file.read(HEAD_BYTES))
        if what:
            within = f" (the member at byte {self._start})" if self._start else ""
            return DataError(f"{self._where}{within}: expected a tar, got a file that {what}")
        return self._damaged(at, f"expected a member header ({error})")

    def _damaged(self, at: int, what: str) -> DataError:
        return DataError(
            f"{self._where} is damaged or truncated at byte {self._start + at}: {what}. "
            "Compare its size and checksum with the original, and copy it again"
        )


class _Headers(tarfile.TarFile):
    """Parser of the standard library. It takes a damaged header for the end, so `Tar` iterates itself."""

    def __init__(self, file: io.BufferedReader | io.BytesIO) -> None:
        super().__init__(fileobj=file, encoding="utf-8", errors="surrogateescape")

    def next(self) -> None:
        """Do nothing: the constructor would read the first member and keep it."""

    def next_at(self, at: int) -> tarfile.TarInfo:
        """Return the member whose headers start at this offset; ValueError when there is none."""
        assert self.fileobj is not None
        self.fileobj.seek(at)
        try:
            info = tarfile.TarInfo.fromtarfile(self)
        except (tarfile.HeaderError, OverflowError) as error:
            raise ValueError(str(error)) from None
        if info.size < 0:
            raise ValueError("negative size")
        return info


def read_member(storage: Storage, entry: Entry) -> bytes:
    """Read a listed image with one request; its path without the first component is the member's name.

    Raises DataError when the member has changed since it was listed.
    """
    where = f"{storage.url}/{entry.archive}"
    end = entry.start + entry.size
    try:
        member = storage.read_range(entry.archive, entry.start, entry.size)
    except MissingKeyError:
        raise DataError(
            f"{where} is in the listing but does not exist here. If it was deleted, start a new output; "
            "otherwise make the source visible on every node and start again"
        ) from None
    except StorageError:
        if storage.size(entry.archive) >= end:
            raise
        raise _changed(where, entry, f"but it ends before byte {end}") from None
    try:
        info = _Headers(io.BytesIO(member)).next_at(0)
        name = _safe(info.name)
    except ValueError as error:
        raise _changed(where, entry, f"but there is no header now ({error})") from None
    if name != entry.path.partition("/")[2]:
        raise _changed(where, entry, f"got {info.name!r}")
    if not _is_plain(info) or info.offset_data + info.size != len(member):
        raise _changed(where, entry, f"but it has {info.size} bytes now")
    return member[info.offset_data :]


def _changed(where: str, entry: Entry, what: str) -> DataError:
    return DataError(
        f"{where} changed since it was listed: expected {entry.path} at byte {entry.start}, {what}. "
        "Restore the archive, or start a new output"
    )


def _is_plain(info: tarfile.TarInfo) -> bool:
    return info.isreg() and not info.issparse()


def _end(info: tarfile.TarInfo) -> int:
    """Return the offset of the next member's headers."""
    data = info.size if info.isreg() else 0
    return info.offset_data + -(-data // _BLOCK) * _BLOCK


def _safe(name: str) -> str:
    """Return a member's name as a relative path; ValueError when it leaves the folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} is not a path inside the folder")
    return "/".join(parts)
