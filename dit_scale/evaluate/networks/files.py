"""Digests of weights files."""

import hashlib
from pathlib import Path

from dit_scale.errors import WeightsError


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises WeightsError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(
            f"cannot read {path} ({error.strerror}); expected the weights of a feature network"
        ) from None
