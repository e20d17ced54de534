"""From the bytes of a picture file to a square uint8 array: decoding and the ADM crop.

Everything here is a pure function of the bytes: no EXIF rotation, no approximate JPEG scaling.
"""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dit_scale_pipeline.inputs.base import InputError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take the contents for, whatever the name says; none of them runs a program."""
MAX_PIXELS = 2**27
"""Largest image before or after a resize; more is a damaged header or a strip, and would fill the memory."""

CROP = "adm_center"
"""Name of `center_crop` in dataset.json."""

Pixels = npt.NDArray[np.uint8]


def decode(data: bytes) -> Image.Image:
    """Bytes of a picture file, whatever its name says => RGB; InputError when they are not a whole one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF, which is not looked at
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_pixels(image.size)
            return image.convert("RGB")
    except UnidentifiedImageError:
        # Pillow's own message holds an address, which differs between runs.
        raise InputError("not a picture in a known format") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged bytes
        raise InputError(f"cannot be decoded: {error}") from None


def _check_pixels(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(f"too large: {size[0]} x {size[1]} pixels")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve (box) while the short side is >= 2 x size, resize (bicubic), take the center."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    _check_pixels(scaled)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_array(image: Image.Image) -> Pixels:
    """RGB => uint8 (H, W, 3)."""
    return np.asarray(image, dtype=np.uint8)
