"""The only interface to folders and S3: objects under keys, written atomically.

    storage = open_storage("s3://bucket/imagenet256")    # or a folder, or file:///folder
    storage.write("dataset.json", data)

Keys are relative to the url, use "/", and cannot point outside it. Readers see a complete write or none.
`disk` and `s3` implement the two kinds; only `s3` imports boto3.
"""

from pathlib import Path

from dit_scale.errors import StorageError
from dit_scale.storage.base import DiskFullError, MissingKeyError, Storage, UnavailableError
from dit_scale.storage.disk import DiskStorage
from dit_scale.storage.s3 import S3Storage

__all__ = [
    "DiskFullError",
    "DiskStorage",
    "MissingKeyError",
    "S3Storage",
    "Storage",
    "UnavailableError",
    "open_storage",
]


def open_storage(url: str | Path) -> Storage:
    """Return the storage for a folder's path, `file:///folder` or `s3://bucket/prefix`, without any I/O."""
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        try:
            return DiskStorage(Path(text).expanduser())
        except RuntimeError:
            raise StorageError(f"{text}: no home directory is known; use an absolute path") from None
    if scheme == "file" and rest.startswith("/"):
        return DiskStorage(Path(rest))
    if scheme == "s3" and rest.strip("/"):
        bucket, _, prefix = rest.partition("/")
        return S3Storage(bucket, prefix.strip("/"))
    raise StorageError(f"cannot open {text!r}: expected a folder, file:///folder or s3://bucket/prefix")
