"""The demo's images: the 1,797 handwritten digits that scikit-learn ships, 8 x 8 pixels, 17 grey levels.

    python demo/digits.py FOLDER

writes them at their original size as PNG files in class folders 0/ to 9/; the encoding job's crop
enlarges them. Everywhere in the demo, digits are in the order of those files, class by class.

Shapes: N digits, S side of a crop in pixels.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dit_scale.data.pixels import Pixels, center_crop, to_array
from dit_scale.errors import DataError, DitScaleError
from dit_scale_pipeline.decoder import read_batch
from dit_scale_pipeline.inputs import open_input

SIDE = 8
LEVELS = 16
"""Grey level of a black pixel; white is 0."""


def load() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return uint8 grey pixels (N, 8, 8), labels (N,), and relative paths in bytewise order."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.argsort(bunch.target, kind="stable")
    pixels_N88 = np.round(bunch.images[order] * (255 / LEVELS)).astype(np.uint8)
    labels_N = bunch.target[order]
    paths = [f"{label}/{number:04d}.png" for label, number in zip(labels_N, order, strict=True)]
    return pixels_N88, labels_N, paths


def write_images(folder: str | Path) -> Path:
    """Write all digits as <class>/<number>.png, unless the folder is already complete.

    The folder appears atomically. Raises DataError if something else exists at its path.
    """
    folder = Path(folder)
    pixels_N88, _, paths = load()
    if _is_finished(folder, paths):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for path, pixels_88 in zip(paths, pixels_N88, strict=True):
            (part / path).parent.mkdir(exist_ok=True)
            Image.fromarray(pixels_88).save(part / path)
        part.chmod(0o755)
        os.rename(part, folder)  # succeeds only if the target is missing or an empty folder
    except OSError as error:
        if not _is_finished(folder, paths):  # else another process finished first
            raise DataError(
                f"cannot write the digits to {folder} ({error.strerror}): expected no such path, or a folder "
                "from an earlier call; remove it, or choose another folder"
            ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _is_finished(folder: Path, paths: list[str]) -> bool:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return folder.is_dir() and sorted(found) == paths


def crops(size: int, folder: str | Path | None = None) -> tuple[Pixels, np.ndarray]:
    """Return the VAE's input, RGB uint8 (N, S, S, 3) after the encoding job's crop, and labels (N,).

    The digits come from scikit-learn, or from a folder that `write_images` made; the result is the same.
    """
    if folder is not None:
        listing = open_input(str(folder)).list()
        pixels_NSS3, account = read_batch(str(folder), listing.kind, listing.entries(), size)
        if account.rejected:
            raise DataError(f"{folder}: {account.rejected[0][0].path}: {account.rejected[0][1]}")
        return pixels_NSS3, np.array([int(listing.class_names[entry.label]) for entry in account.decoded])
    pixels_N88, labels_N, _ = load()
    images = (Image.fromarray(pixels_88).convert("RGB") for pixels_88 in pixels_N88)
    return np.stack([to_array(center_crop(image, size)) for image in images]), labels_N


def to_levels(images_NSS3: Pixels) -> np.ndarray:
    """Average each of the 8 x 8 boxes: RGB uint8 (N, S, S, 3) => float grey levels (N, 8, 8) in 0..16."""
    num_images, side = images_NSS3.shape[:2]
    box = side // SIDE
    boxes = images_NSS3.reshape(num_images, SIDE, box, SIDE, box, 3)
    return boxes.mean(axis=(2, 4, 5), dtype=np.float64) * (LEVELS / 255)


def split(labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split digit numbers into a training set (80 %) and a held-out set (20 %), stratified by class."""
    from sklearn.model_selection import train_test_split

    numbers = np.arange(len(labels_N))
    fit, held_out = train_test_split(numbers, test_size=0.2, stratify=labels_N, random_state=0)
    return np.sort(fit), np.sort(held_out)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the 1,797 digits as PNG class folders.")
    parser.add_argument("folder", help="folder to create")
    try:
        folder = write_images(parser.parse_args().folder)
    except DitScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(load()[2])} digits in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
