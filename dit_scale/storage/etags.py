"""ETags of S3 objects: most servers use MD5 digests, against which a read can be verified."""

import hashlib
from typing import Any


def is_md5(answer: dict[str, Any], known_parts: bool) -> bool:
    """Whether the ETag in an answer should equal `etag_of` of the object.

    It does not if the server encrypts with managed keys, or if the sizes of the object's parts are unknown.
    """
    etag, encryption = answer.get("ETag", "").strip('"'), answer.get("ServerSideEncryption", "AES256")
    known_parts = known_parts or "-" not in etag
    return bool(etag) and known_parts and encryption == "AES256" and "SSECustomerAlgorithm" not in answer


def etag_of(data: bytes, part_bytes: int) -> str:
    """Return the ETag of an object uploaded in parts of this size: its MD5, or the MD5 of the parts' MD5s."""
    if len(data) <= part_bytes:
        return _md5(data).hexdigest()
    starts = range(0, len(data), part_bytes)
    digests = b"".join(_md5(memoryview(data)[start : start + part_bytes]).digest() for start in starts)
    return f"{_md5(digests).hexdigest()}-{len(starts)}"


def _md5(data: bytes | memoryview) -> Any:
    return hashlib.md5(data, usedforsecurity=False)
