"""Files of images: a grid for people, an npz for evaluation programs."""

from pathlib import Path

import numpy as np
from PIL import Image

from dit_scale.storage.outputs import new_file

MAX_GRID_IMAGES = 100


def write_grid(images: np.ndarray, path: Path) -> None:
    """uint8 (N, height, width, 3) => the first hundred as one PNG, row by row with two pixels between."""
    images = images[:MAX_GRID_IMAGES]
    count, height, width, _ = images.shape
    columns = min(count, 10) if count > 16 else -(-count // max(1, int(count**0.5)))
    rows = -(-count // columns)
    grid = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = 2 + index // columns * (height + 2), 2 + index % columns * (width + 2)
        grid[top : top + height, left : left + width] = image
    with new_file(path) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")


def write_npz(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """The sample file of the ADM evaluation suite: arr_0 uint8 (N, height, width, 3), arr_1 labels."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images, arr_1=labels)
