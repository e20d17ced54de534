"""The crop of ADM, written a second time: sizes are computed first, images resized afterwards."""

import numpy as np
from PIL import Image


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """Crop the center square of `size` pixels: BOX halvings, then one BICUBIC resize."""
    width, height = image.size
    steps = []
    while width >= 2 * size and height >= 2 * size:
        width, height = width // 2, height // 2
        steps.append((width, height, Image.Resampling.BOX))
    factor = size / (width if width < height else height)
    steps.append((round(width * factor), round(height * factor), Image.Resampling.BICUBIC))
    for width, height, filter_ in steps:
        image = image.resize((width, height), resample=filter_)
    array = np.array(image)
    first_row, first_column = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[first_row : first_row + size, first_column : first_column + size]
