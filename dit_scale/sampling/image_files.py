"""Write images to files: a grid to look at, a folder of PNG files, a WebDataset tar.

Shapes: N images, H W pixels.
"""

import io
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
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


def write_png_folder(parts: Iterable[np.ndarray], labels: Sequence[int], folder: Path) -> None:
    """Write each image to `<number>-class<class>.png` in one flat folder, which replaces an existing one.

    The folder appears under its name when it is complete.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for number, png in enumerate(_pngs(parts)):
        with (temporary / f"{number:08}-class{labels[number]:04}.png").open("wb") as file:
            file.write(png)
            file.flush()
            os.fsync(file.fileno())
    if folder.is_dir():
        shutil.rmtree(folder)
    temporary.rename(folder)


def write_tar(parts: Iterable[np.ndarray], labels: Sequence[int], path: Path) -> None:
    """Write a WebDataset tar: `<number>.png` and `<number>.cls` of each image, in order, without times."""
    with (
        new_file(path) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for number, png in enumerate(_pngs(parts)):
            for suffix, data in (("png", png), ("cls", str(labels[number]).encode())):
                info = tarfile.TarInfo(f"{number:08}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def _pngs(parts: Iterable[np.ndarray]) -> Iterator[bytes]:
    for part_NHW3 in parts:
        for image in part_NHW3:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            yield buffer.getvalue()
