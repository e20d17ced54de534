"""Small sets of images in every form that `dit-scale evaluate` reads, and a feature network of no weights."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_scale.evaluate.features import Features, NetworkIdentity


def random_images(num: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Return smooth random images (N, H, W, 3) uint8."""
    draws = np.random.Generator(np.random.Philox(key=seed))
    coarse = draws.integers(0, 256, (num, size // 4, size // 4, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def write_folder(images_NHW3: np.ndarray, folder: Path) -> Path:
    """Write PNG files in two class folders; their bytewise order is that of the array."""
    for number, image in enumerate(images_NHW3):
        path = folder / str(2 * number // len(images_NHW3)) / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_tar(images_NHW3: np.ndarray, path: Path) -> Path:
    """Write a WebDataset tar of PNG files and class files."""
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images_NHW3):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, format="PNG")
            for suffix, data in (("cls", b"3"), ("png", stream.getvalue())):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_npz(images_NHW3: np.ndarray, path: Path, compressed: bool = False) -> Path:
    """Write ADM's sample file."""
    save = np.savez_compressed if compressed else np.savez
    save(path, arr_0=images_NHW3, arr_1=np.zeros(len(images_NHW3), np.int64))
    return path


class BoxNetwork:
    """A feature network without weights: means of 2 x 2 boxes of the image."""

    def __init__(self, name: str = "boxes", spatial: bool = True) -> None:
        self.identity = NetworkIdentity(name, "0" * 64, "boxes of a half of the side")
        self.num_passes = 0
        self._spatial = spatial

    def __call__(self, images_NHW3: Tensor) -> Features:
        self.num_passes += 1
        side = images_NHW3.shape[1] // 2
        boxes = torch.nn.functional.avg_pool2d(images_NHW3.float().permute(0, 3, 1, 2), side)
        pool_NF = boxes.flatten(1) / 255
        return Features(
            pool_NF,
            pool_NF[:, :5].clone() if self._spatial else None,
            torch.softmax(4 * pool_NF, dim=1),
        )
