"""JSON with a digest of itself: its last key holds the SHA-256 of all bytes before the comma in front of it.

    {"step":3,"sha256":"27a4..."}        head -c -77 FILE | sha256sum

The key is `sha256` unless the object already has such a key. Files of earlier versions may have no digest;
read them with `unseal_any`.
"""

import hashlib
import json
import re
from typing import Any

from dit_scale.errors import DitScaleError

KEY = "sha256"
_SEALED_END = re.compile(rb'[0-9a-f]{64}"\s*}\s*\Z')
"""No unsealed file ends like this, so a sealed file is recognised even if a bit of its key is flipped."""

Damaged = type[DitScaleError]


def sealed(tree: dict[str, Any], indent: int | None = None, key: str = KEY) -> bytes:
    """Return the object as JSON with its digest, on one line or indented."""
    assert tree
    assert key not in tree
    separators = (",", ":") if indent is None else None
    body = json.dumps(tree, indent=indent, separators=separators).encode()[:-1]
    return body + _seal(body, key)


def unseal(data: bytes, where: str, damaged: Damaged, key: str = KEY) -> dict[str, Any]:
    """Return the object in sealed JSON, without its digest. Raises `damaged` if any byte has changed."""
    body = data[: -len(_seal(b"", key))]
    if not body or body + _seal(body, key) != data:
        raise damaged(f"{where} is damaged (its SHA-256 is wrong)")
    tree: dict[str, Any] = json.loads(data)
    del tree[key]
    return tree


def unseal_any(data: bytes, where: str, damaged: Damaged, key: str = KEY) -> tuple[dict[str, Any], bool]:
    """Return the object and whether it had a digest. Raises `damaged` if it is not a JSON object either."""
    if f'"{key}":"'.encode() in data[-len(_seal(b"", key)) :] or _SEALED_END.search(data[-100:]):
        return unseal(data, where, damaged, key), True
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise damaged(f"{where} is not JSON ({error}); it is damaged, or another kind of file") from None
    if not isinstance(tree, dict):
        raise damaged(f"{where}: expected a JSON object, got a {type(tree).__name__}")
    return tree, False


def _seal(body: bytes, key: str) -> bytes:
    return f',"{key}":"{hashlib.sha256(body).hexdigest()}"}}'.encode()
