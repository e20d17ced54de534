"""Write images to files: a grid to look at, and an npz file for evaluation programs.

Shapes: N images, H W pixels.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from dit_scale.storage.outputs import new_file

MAX_GRID_IMAGES = 100


def write_grid(images_NHW3: np.ndarray, path: Path) -> None:
    """Write the first 100 uint8 images as one PNG, row by row, with a 2-pixel gap."""
    images_NHW3 = images_NHW3[:MAX_GRID_IMAGES]
    count, height, width, _ = images_NHW3.shape
    columns = min(count, 10) if count > 16 else -(-count // max(1, int(count**0.5)))
    rows = -(-count // columns)
    grid = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images_NHW3):
        top, left = 2 + index // columns * (height + 2), 2 + index % columns * (width + 2)
        grid[top : top + height, left : left + width] = image
    with new_file(path) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")


def write_npz(images_NHW3: np.ndarray, labels_N: np.ndarray, path: Path) -> None:
    """Write the sample file of the ADM evaluation suite: arr_0 uint8 images, arr_1 labels."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images_NHW3, arr_1=labels_N)
