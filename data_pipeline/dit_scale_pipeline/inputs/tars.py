"""Tar archives read in place: their members one after the other, or one of them by its place.

Nothing is unpacked. Only headers are read, in windows: small ones on a disk, so that the data between
two headers is passed over; large ones on S3, where a request costs more than the bytes of many images.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from dit_scale.errors import DataError, StorageError
from dit_scale.storage import DiskStorage, MissingKeyError, Storage
from dit_scale_pipeline.inputs.base import Entry
from dit_scale_pipeline.inputs.contents import HEAD_BYTES, what_it_is
from dit_scale_pipeline.inputs.ranged import buffered

DISK_WINDOW_BYTES = 4 * 2**10
REMOTE_WINDOW_BYTES = 4 * 2**20

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar."""

    name: str
    """Its path, as unpacking would make it."""
    start: int
    """Where its headers begin in the object that holds the tar."""
    data_start: int
    size: int
    """Of its data."""

    @property
    def span(self) -> int:
        """Bytes of its headers and its data."""
        return self.data_start + self.size - self.start


class Tar:
    """A tar that is an object, or a part of one: bytes `start` to `end` of `key`."""

    def __init__(
        self, storage: Storage, key: str, start: int, end: int, window_bytes: int | None = None
    ) -> None:
        self._where = f"{storage.url}/{key}"
        self._start, self._length = start, end - start
        default = DISK_WINDOW_BYTES if isinstance(storage, DiskStorage) else REMOTE_WINDOW_BYTES
        self._file = buffered(storage, key, start, end, window_bytes or default)

    def __iter__(self) -> Iterator[TarMember]:
        """Its regular members, to the end mark. DataError when it is damaged, or holds links or devices."""
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
                    f"{self._where}: the member at byte {self._start + at} would not unpack below a folder "
                    f"({error}). Pack the archive again, from inside its folder (tar -C FOLDER)"
                ) from None
            if not info.isdir():
                yield self._member(info, name, at)
            at = _end(info)

    def data(self, member: TarMember) -> bytes:
        """The bytes of the member that came last."""
        self._file.seek(member.data_start - self._start)
        return self._file.read(member.size)

    def _more(self, at: int) -> bool:
        """Whether another header comes; False at the end mark, after which there must be nothing."""
        self._file.seek(at)
        block = self._file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise self._damaged(at, "expected a member or the end mark, the archive ends there")
        if block.strip(b"\0"):
            return True
        while rest := self._file.read(REMOTE_WINDOW_BYTES):
            if rest.strip(b"\0"):
                raise DataError(
                    f"{self._where}: expected only zeros behind its end mark at byte {self._start + at}, "
                    "found more. If archives were joined (cat), take them apart; else it is damaged, copy it "
                    "again"
                )
        return False

    def _member(self, info: tarfile.TarInfo, name: str, at: int) -> TarMember:
        if not _is_plain(info):
            raise DataError(
                f"{self._where}: {info.name!r} at byte {self._start + at} is a link, a device or a sparse "
                "file; expected regular files and folders. Pack it again with what it stands for "
                "(tar --dereference --hard-dereference)"
            )
        if info.offset_data + info.size > self._length:
            raise self._damaged(
                at,
                f"expected {info.size} bytes of {info.name!r}, the archive ends "
                f"{info.offset_data + info.size - self._length} bytes too early",
            )
        start = self._start + info.offset
        return TarMember(name, start, self._start + info.offset_data, info.size)

    def _no_header(self, at: int, error: ValueError) -> DataError:
        """What to say where the header of a member should be."""
        self._file.seek(at)
        what = "" if at else what_it_is(self._file.read(HEAD_BYTES))
        if what:
            within = f" (the member at byte {self._start})" if self._start else ""
            return DataError(f"{self._where}{within}: expected a tar, found a file that {what}")
        return self._damaged(at, f"expected the header of a member, found none ({error})")

    def _damaged(self, at: int, what: str) -> DataError:
        return DataError(
            f"{self._where} is damaged or was cut off at byte {self._start + at}: {what}. "
            "Compare its size and checksum with the original's, and copy it again"
        )


class _Headers(tarfile.TarFile):
    """The parser of the standard library; it takes a damaged header for the end, hence the walk is ours."""

    def __init__(self, file: io.BufferedReader | io.BytesIO) -> None:
        super().__init__(fileobj=file, encoding="utf-8", errors="surrogateescape")

    def next(self) -> None:
        """The standard library's constructor would read the first member, and keep it."""

    def next_at(self, at: int) -> tarfile.TarInfo:
        """The member whose headers begin there; ValueError when none does."""
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
    """The data of a listed image, whose path is the name of its member below one folder.

    One read; DataError when another member, or none, is there now.
    """
    where = f"{storage.url}/{entry.archive}"
    end = entry.start + entry.size
    try:
        member = storage.read_range(entry.archive, entry.start, entry.size)
    except MissingKeyError:
        raise DataError(
            f"{where} is in the listing but not here; if it was deleted, begin another output, else make the "
            "source visible on every node and start again"
        ) from None
    except StorageError:
        if storage.size(entry.archive) >= end:
            raise
        raise _changed(where, entry, f"it ends before byte {end}") from None
    try:
        info = _Headers(io.BytesIO(member)).next_at(0)
        name = _safe(info.name)
    except ValueError as error:
        raise _changed(where, entry, f"no header is there now ({error})") from None
    if name != entry.path.partition("/")[2]:
        raise _changed(where, entry, f"{info.name!r} is there now")
    if not _is_plain(info) or info.offset_data + info.size != len(member):
        raise _changed(where, entry, f"it has {info.size} bytes now")
    return member[info.offset_data :]


def _changed(where: str, entry: Entry, what: str) -> DataError:
    return DataError(
        f"{where} changed since it was listed: expected {entry.path} at byte {entry.start}, {what}. Put the "
        "archive of the listing back, or begin another output"
    )


def _is_plain(info: tarfile.TarInfo) -> bool:
    return info.isreg() and not info.issparse()


def _end(info: tarfile.TarInfo) -> int:
    """Where the headers of the next member begin."""
    data = info.size if info.isreg() else 0
    return info.offset_data + -(-data // _BLOCK) * _BLOCK


def _safe(name: str) -> str:
    """A member's name as a relative path; ValueError for one that is none."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} is no path below the archive's folder")
    return "/".join(parts)
