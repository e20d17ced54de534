"""JSON that carries a digest of itself: its last key is the SHA-256 of all bytes before the comma before it.

    {"step":3,"sha256":"27a4..."}        head -c -77 FILE | sha256sum

The key is `sha256` unless an object has one of its own. Files that earlier versions wrote may have no
digest: whoever must read those calls `unseal_any`.
"""

import hashlib
import json
import re
from typing import Any

from dit_scale.errors import DitScaleError

KEY = "sha256"
_SEALED_END = re.compile(rb'[0-9a-f]{64}"\s*}\s*\Z')
"""So ends no unsealed file: one that was sealed stays known as such when a bit of the key is flipped."""

Damaged = type[DitScaleError]


def sealed(tree: dict[str, Any], indent: int | None = None, key: str = KEY) -> bytes:
    """The object as JSON with its digest; on one line, or with `indent` spaces for people."""
    assert tree
    assert key not in tree
    separators = (",", ":") if indent is None else None
    body = json.dumps(tree, indent=indent, separators=separators).encode()[:-1]
    return body + _seal(body, key)


def unseal(data: bytes, where: str, damaged: Damaged, key: str = KEY) -> dict[str, Any]:
    """The object in sealed JSON, without its digest. Raises `damaged` when a byte is not as it was."""
    body = data[: -len(_seal(b"", key))]
    if not body or body + _seal(body, key) != data:
        raise damaged(f"{where} is damaged (its SHA-256 does not fit)")
    tree: dict[str, Any] = json.loads(data)
    del tree[key]
    return tree


def unseal_any(data: bytes, where: str, damaged: Damaged, key: str = KEY) -> tuple[dict[str, Any], bool]:
    """The object, and whether it carried its digest. Raises `damaged` when it is no JSON object, too."""
    if f'"{key}":"'.encode() in data[-len(_seal(b"", key)) :] or _SEALED_END.search(data[-100:]):
        return unseal(data, where, damaged, key), True
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise damaged(f"{where} is not JSON ({error}); it was damaged or is of another kind") from None
    if not isinstance(tree, dict):
        raise damaged(f"{where}: expected a JSON object, got a {type(tree).__name__}")
    return tree, False


def _seal(body: bytes, key: str) -> bytes:
    return f',"{key}":"{hashlib.sha256(body).hexdigest()}"}}'.encode()
