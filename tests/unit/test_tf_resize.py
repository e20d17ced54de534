"""TensorFlow 1's bilinear resize against its formula in float64."""

import numpy as np
import pytest
import torch

from dit_scale.evaluate.networks.tf_resize import resize_bilinear_tf1

SIZES = [
    (299, 299),
    (300, 298),
    (1, 1),
    (1, 7),
    (2, 3),
    (8, 8),
    (64, 64),
    (256, 256),
    (512, 300),
    (17, 411),
    (598, 149),
]


def formula(x_NCHW: np.ndarray, height: int, width: int) -> np.ndarray:
    """Evaluate the formula: both coordinates are i * in/out, and their neighbours end at the border."""
    _, _, rows, columns = x_NCHW.shape
    y = np.arange(height) * rows / height
    x = np.arange(width) * columns / width
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    bottom, right = np.minimum(top + 1, rows - 1), np.minimum(left + 1, columns - 1)
    down, across = (y - top)[:, None], x - left
    return (
        x_NCHW[:, :, top][..., left] * (1 - down) * (1 - across)
        + x_NCHW[:, :, top][..., right] * (1 - down) * across
        + x_NCHW[:, :, bottom][..., left] * down * (1 - across)
        + x_NCHW[:, :, bottom][..., right] * down * across
    )


@pytest.mark.parametrize("size", SIZES)
def test_it_is_tensorflows_formula(size: tuple[int, int]) -> None:
    x_NCHW = np.random.default_rng(0).integers(0, 256, (2, 3, *size)).astype(np.float32)
    resized = resize_bilinear_tf1(torch.from_numpy(x_NCHW), 299, 299)
    assert resized.shape == (2, 3, 299, 299)
    assert resized.dtype == torch.float32
    # A source coordinate below 598 has an error of 2^-15 in fp32, times a step of at most 255 levels.
    assert np.abs(resized.numpy() - formula(x_NCHW.astype(np.float64), 299, 299)).max() < 255 * 2.0**-14


def test_the_size_of_the_network_passes_unchanged() -> None:
    x = torch.randint(256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(resize_bilinear_tf1(x, 299, 299), x)


def test_it_is_neither_centered_nor_antialiased() -> None:
    """Halving keeps every second pixel, doubling starts at the first: what other resizes do not."""
    x = torch.arange(8.0).reshape(1, 1, 1, 8)
    assert resize_bilinear_tf1(x, 1, 4).flatten().tolist() == [0, 2, 4, 6]
    assert resize_bilinear_tf1(x[..., :3], 1, 6).flatten().tolist() == [0, 0.5, 1, 1.5, 2, 2]
    centered = torch.nn.functional.interpolate(x, (1, 4), mode="bilinear")
    assert centered.flatten().tolist() == [0.5, 2.5, 4.5, 6.5]
