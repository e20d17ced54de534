"""listing.safetensors, the images of a data set by key: sealed facts, and a digest of all arrays.

The encoding job writes and reads it (`dit_scale_pipeline.inputs.saved`); this module knows its bytes.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dit_scale.errors import DataError
from dit_scale.sealed import sealed, unseal_any

LISTING_KEY = "listing.safetensors"
FACTS, FACTS_DIGEST, DIGEST = "facts", "facts_sha256", "arrays_sha256"

Arrays = Mapping[str, npt.NDArray[Any]]


def pack(facts: Mapping[str, Any], arrays: Arrays) -> bytes:
    """Return the file with these facts, as JSON, and these arrays."""
    text = sealed({**facts, DIGEST: _digest(arrays)}, key=FACTS_DIGEST)
    return save({FACTS: np.frombuffer(text, np.uint8), **arrays})


def unpack(data: bytes, where: str) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the facts and arrays of a file. Raises DataError if any byte has changed.

    Files of earlier versions have no digest of their arrays.
    """
    try:
        arrays = load(data)
        facts, has_digest = unseal_any(arrays.pop(FACTS).tobytes(), where, DataError, FACTS_DIGEST)
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{where} is damaged ({error})") from None
    if has_digest and facts.pop(DIGEST) != _digest(arrays):
        raise DataError(f"{where} is damaged (the SHA-256 of its arrays is wrong)")
    return facts, arrays


def _digest(arrays: Arrays) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values, ordered by name."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
