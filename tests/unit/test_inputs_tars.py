"""Reading tars: those of the standard library and GNU tar, and damaged ones."""

import io
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from dit_scale.errors import DataError, StorageError
from dit_scale.storage import DiskStorage, S3Storage, Storage, open_storage
from dit_scale_pipeline.inputs import tars
from dit_scale_pipeline.inputs.base import Entry
from dit_scale_pipeline.inputs.tars import Tar, TarMember, read_member
from tests.support.archives import tar_of, watch_reads
from tests.support.needs import needs
from tests.support.s3 import BUCKET

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


class Memory(DiskStorage):
    """One object in memory that reads like a disk."""

    def __init__(self, data: bytes) -> None:
        super().__init__(Path("/memory"))
        self._data = data

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if start + length > len(self._data):
            raise StorageError("the object is truncated")
        return self._data[start : start + length]

    def size(self, key: str) -> int:
        return len(self._data)


def walk(data: bytes) -> list[TarMember]:
    return list(Tar(Memory(data), "a.tar", 0, len(data)))


def entry_of(member: TarMember, archive: str = "a.tar") -> Entry:
    return Entry(0, f"x/{member.name}", 0, archive=archive, start=member.start, size=member.span)


letters = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]), max_size=90
)
names = st.lists(letters.filter(lambda part: part not in ("", ".", "..")), min_size=1, max_size=4).map(
    "/".join
)
members = st.dictionaries(names, st.binary(max_size=1500), max_size=6)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    format_ = draw(st.sampled_from(FORMATS))
    files = draw(members)
    # Without members, the standard library takes a global header for damage.
    common = {"comment": "of all members"} if files and draw(st.booleans()) else {}
    try:
        return tar_of(files, format_, common)
    except ValueError:  # a name that is too long for USTAR
        reject()


@given(archives())
def test_the_walk_finds_what_the_standard_library_finds(data: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        expected = [TarMember(i.name, i.offset, i.offset_data, i.size) for i in tar.getmembers()]
        contents = [tar.extractfile(i).read() for i in tar.getmembers()]  # type: ignore[union-attr]
    assert walk(data) == expected
    storage = Memory(data)
    assert [read_member(storage, entry_of(member)) for member in expected] == contents


@given(archives(), st.data())
def test_an_archive_that_is_cut_off_is_damaged_or_lacks_only_its_padding(
    data: bytes, draw: st.DataObject
) -> None:
    cut = draw.draw(st.integers(0, len(data)))
    try:
        found = walk(data[:cut])
    except DataError as error:
        assert "a.tar is damaged or truncated at byte" in str(error)  # noqa: PT017
        assert data[cut:].strip(b"\0") or cut < _end_mark(data) + 512, "an archive that has its mark is whole"
    else:
        assert found == walk(data)


def _end_mark(data: bytes) -> int:
    last = max((m.data_start + -(-m.size // 512) * 512 for m in walk(data)), default=0)
    assert not data[last:].strip(b"\0")
    return last


def test_every_byte_at_which_a_small_archive_is_cut_off() -> None:
    data = tar_of({"a.jpg": b"1" * 600, "b" * 120: b"2"}, tarfile.PAX_FORMAT)
    mark = _end_mark(data)
    for cut in range(0, len(data), 16):
        if cut < mark + 512:
            with pytest.raises(DataError, match="truncated at byte") as caught:
                walk(data[:cut])
            if 512 <= cut < 512 + 600:
                assert f"at byte 0: expected 600 bytes of 'a.jpg', but the archive ends {1112 - cut}" in str(
                    caught.value
                )
        else:
            assert [member.name for member in walk(data[:cut])] == ["a.jpg", "b" * 120]


@pytest.mark.parametrize("offset", [0, 130, 148, 511])
def test_a_damaged_header_is_named_by_its_place_and_is_not_the_end(offset: int) -> None:
    data = bytearray(tar_of({"a.jpg": b"1" * 600, "b.jpg": b"2", "c.jpg": b"3"}))
    data[1536 + offset] ^= 0x11
    with pytest.raises(DataError, match=r"/memory/a.tar .* at byte 1536: expected a member header"):
        walk(bytes(data))


@pytest.mark.parametrize("type_", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [-1, -1024, 2**80])
def test_an_impossible_size_is_damage(type_: bytes, size: int) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = type_, size
    with pytest.raises(DataError, match="at byte 0: expected"):
        walk(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))


def test_archives_that_were_joined_are_refused() -> None:
    with pytest.raises(DataError, match="expected only zeros after the end mark"):
        walk(tar_of({"a": b"1"}) + tar_of({"b": b"2"}))


def test_names_are_those_that_unpacking_would_make() -> None:
    assert [m.name for m in walk(tar_of({"./a/b.jpg": b"", "/c//d.jpg": b""}))] == ["a/b.jpg", "c/d.jpg"]
    with pytest.raises(DataError, match="is not a path inside the folder"):
        walk(tar_of({"a/../../b": b""}))


@pytest.mark.parametrize(
    "type_", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"?"]
)
def test_only_regular_members_and_folders_are_taken(type_: bytes) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("strange", type_)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "folder" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
    with pytest.raises(DataError, match=r"'strange' at byte 512 is a link, a device or a sparse file"):
        walk(stream.getvalue())


@pytest.mark.parametrize("format_", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_what_gnu_tar_writes(format_: str, tmp_path: Path) -> None:
    needs(shutil.which("tar") is not None, "tar")
    long = "l" * 80 if format_ in ("v7", "ustar") else "l" * 200
    paths = ["d/n01_1.JPEG", f"d/{long}.JPEG", "d/\u00e9.JPEG", "d/empty"]
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"" if path.endswith("empty") else path.encode() * 50)
    command = ["tar", f"--format={format_}", "-cf", "a.tar", "./d"]
    subprocess.run(command, cwd=tmp_path, check=True)
    storage = open_storage(tmp_path)
    found = list(Tar(storage, "a.tar", 0, storage.size("a.tar")))
    assert sorted(member.name for member in found) == sorted(paths)
    for member in found:
        assert read_member(storage, entry_of(member)) == (tmp_path / member.name).read_bytes()


def test_a_sparse_member_is_refused_in_every_way_of_writing_it(tmp_path: Path) -> None:
    needs(shutil.which("tar") is not None, "tar")
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(2**20)
        file.write(b"end")
    for options in (["--format=gnu"], ["--format=pax", "--sparse-version=0.1"], ["--format=pax"]):
        subprocess.run(["tar", "-S", *options, "-cf", "a.tar", "holes"], cwd=tmp_path, check=True)
        storage = open_storage(tmp_path)
        with pytest.raises(DataError, match="sparse file"):
            list(Tar(storage, "a.tar", 0, storage.size("a.tar")))


def test_a_tar_in_a_tar_is_walked_in_its_bounds() -> None:
    inner = tar_of({"x.jpg": b"1" * 700, "y.jpg": b"2"})
    outer = tar_of({"a.tar": inner, "b.tar": tar_of({"z.jpg": b"3"})})
    storage = Memory(outer)
    at = walk(outer)[0].data_start
    found = list(Tar(storage, "outer.tar", at, at + len(inner)))
    assert [member.name for member in found] == ["x.jpg", "y.jpg"]
    assert read_member(storage, entry_of(found[1])) == b"2"
    with pytest.raises(DataError, match=f"at byte {at + 1536}"):
        list(Tar(storage, "outer.tar", at, at + 1700))


def test_an_archive_that_changed_since_is_no_image() -> None:
    data = tar_of({"a.jpg": b"1" * 600, "b.jpg": b"2" * 600})
    first, second = walk(data)
    changed = r"a.tar changed since it was listed: expected x/b.jpg at byte 1536, .*\. Restore the archive"
    for other, why in (
        (tar_of({"a.jpg": b"1" * 600, "c.jpg": b"2" * 600}), "got 'c.jpg'"),
        (tar_of({"a.jpg": b"1" * 600, "b.jpg": b"2" * 599}) + bytes(512), "it has 599 bytes now"),
        (tar_of({"a.jpg": b"1" * 1300, "b.jpg": b"2" * 600}), "there is no header now"),
        (data[:1500], "it ends before byte 2648"),
    ):
        with pytest.raises(DataError, match=changed) as caught:
            read_member(Memory(other), entry_of(second))
        assert why in str(caught.value)
    assert read_member(Memory(data), entry_of(first)) == b"1" * 600


def test_an_archive_that_is_gone_is_no_bad_image(tmp_path: Path) -> None:
    member = walk(tar_of({"a.jpg": b"1"}))[0]
    with pytest.raises(DataError, match=r"a.tar is in the listing but does not exist here"):
        read_member(open_storage(tmp_path), entry_of(member))


BIG = {f"{number}.jpg": bytes([number]) * 30_000 for number in range(100)}


def test_on_a_disk_the_data_between_headers_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(BIG))
    reads = watch_reads(monkeypatch)
    storage: Storage = open_storage(tmp_path)
    found = list(Tar(storage, "a.tar", 0, storage.size("a.tar")))
    assert len(found) == len(BIG)
    assert len(reads.ranges) <= len(BIG) + 5
    assert max(length for _, _, length in reads.ranges) <= tarfile.RECORDSIZE
    assert reads.bytes < storage.size("a.tar") / 5
    reads.clear()
    assert read_member(storage, entry_of(found[50])) == BIG["50.jpg"]
    assert reads.ranges == [("a.tar", found[50].start, found[50].span)]
    assert reads.whole == []


def test_on_s3_a_window_holds_many_members(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tars, "REMOTE_WINDOW_BYTES", 500_000)
    storage = S3Storage(BUCKET, "tars")
    data = tar_of(BIG, tarfile.PAX_FORMAT)
    storage.write("a.tar", data)
    reads = watch_reads(monkeypatch)
    found = list(Tar(storage, "a.tar", 0, len(data)))
    assert found == walk(data)
    assert len(reads.ranges) <= len(data) / 450_000 + 1
    reads.clear()
    assert read_member(storage, entry_of(found[7])) == BIG["7.jpg"]
    assert len(reads.ranges) == 1
    cut = replace(entry_of(found[-1]), size=10**7)
    with pytest.raises(DataError, match="it ends before byte"):
        read_member(storage, cut)
