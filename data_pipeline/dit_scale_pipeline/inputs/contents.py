"""Recognize files of an unexpected kind by their first bytes or their name."""

from collections.abc import Iterable

from dit_scale_pipeline.inputs.names import few

UNPACK = "unpack it and pass the folder, or the tars inside"
"""Advice for a compressed archive."""

_KNOWN = (
    (b"\x1f\x8b", f"is compressed with gzip, but archives are read in place: {UNPACK}"),
    (b"BZh", f"is compressed with bzip2, but archives are read in place: {UNPACK}"),
    (b"\xfd7zXZ\0", f"is compressed with xz, but archives are read in place: {UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed with zstd, but archives are read in place: {UNPACK}"),
    (b"PK\x03\x04", f"is a zip archive: {UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive: {UNPACK}"),
    (b"Rar!", f"is a rar archive: {UNPACK}"),
    (b"PAR1", "is a Parquet file: rename it with the suffix .parquet"),
    (
        b"version https://git-lfs",
        "is a Git LFS pointer: fetch the file itself (git lfs install; git lfs pull)",
    ),
    (b"<!DOCTYPE", "is a web page: the download failed, repeat it"),
    (b"<html", "is a web page: the download failed, repeat it"),
)
"""First bytes of a file => what it is and what to do."""
HEAD_BYTES = 512
"""Bytes that are enough to recognize a file."""

_COMPRESSED = (".zip", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")


def is_compressed(name: str) -> bool:
    """Whether the name is that of a compressed archive."""
    return name.lower().endswith(_COMPRESSED)


def unpack_advice(names: Iterable[str]) -> str:
    """Name the compressed archives among these files and what to do; empty when there are none."""
    packed = [name for name in names if is_compressed(name)]
    return f"{few(packed)}, but compressed archives are not supported: {UNPACK}" if packed else ""


def describe_file(head: bytes) -> str:
    """Describe a file by its first bytes, with advice; empty when they are not recognized."""
    return next((what for magic, what in _KNOWN if head[: len(magic)].lower() == magic.lower()), "")
