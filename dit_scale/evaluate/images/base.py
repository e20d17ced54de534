"""A set of images to evaluate: any of them can be read by its number, so every process reads its own.

Shapes: N images, H W pixels (H = W).
"""

import hashlib
from pathlib import Path
from typing import Protocol

from dit_scale.data.pixels import Pixels

TILE = 64
"""Images per forward pass, of a feature network as of a decoder. All passes have this shape, so the features
of an image do not depend on how many processes share the work."""
BLOCK_BYTES = 2**20
"""Bytes of a file to read at a time where it is read to its end."""


class ImageSet(Protocol):
    """Square RGB images of one size, in a fixed order."""

    source: str
    """Where they come from, as the user wrote it."""
    count: int
    image_size: int
    preparation: str
    """How their pixels come from the stored bytes, in words."""

    def digest(self) -> str:
        """Return the SHA-256 of all that the pixels depend on. Reads every byte and may raise DataError."""
        ...

    def read(self, images: range) -> Pixels:
        """Read the images of one tile, or of a part of it => (N, H, W, 3) uint8. DataError names damage."""
        ...


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
