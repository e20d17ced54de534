"""What a file is that is not what was expected: by its first bytes, or by its name."""

from collections.abc import Iterable

from dit_scale_pipeline.inputs.names import few

UNPACK = "unpack it, and name the folder, or the tars, that it holds"
"""What to do with a compressed archive."""

_KNOWN = (
    (b"\x1f\x8b", f"is compressed with gzip, and archives are read in place: {UNPACK}"),
    (b"BZh", f"is compressed with bzip2, and archives are read in place: {UNPACK}"),
    (b"\xfd7zXZ\0", f"is compressed with xz, and archives are read in place: {UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed with zstd, and archives are read in place: {UNPACK}"),
    (b"PK\x03\x04", f"is a zip archive: {UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive: {UNPACK}"),
    (b"Rar!", f"is a rar archive: {UNPACK}"),
    (b"PAR1", "is a Parquet file: give it the suffix .parquet"),
    (
        b"version https://git-lfs",
        "is a git-LFS pointer that stands for the file: fetch the file (git lfs install; git lfs pull)",
    ),
    (b"<!DOCTYPE", "is a web page, not the file that was asked for: download it again"),
    (b"<html", "is a web page, not the file that was asked for: download it again"),
)
"""How a file begins => what it is, and what to do."""
HEAD_BYTES = 512
"""So many bytes tell."""

_COMPRESSED = (".zip", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")


def is_compressed(name: str) -> bool:
    """Whether a file is a compressed archive by its name."""
    return name.lower().endswith(_COMPRESSED)


def compressed(names: Iterable[str]) -> str:
    """Which of these files are compressed archives, and what to do with them; empty when none is."""
    packed = [name for name in names if is_compressed(name)]
    return f"{few(packed)}, and compressed archives are not read in place: {UNPACK}" if packed else ""


def what_it_is(head: bytes) -> str:
    """What a file with these first bytes is, and what to do with it; empty when they do not tell."""
    return next((what for magic, what in _KNOWN if head[: len(magic)].lower() == magic.lower()), "")
