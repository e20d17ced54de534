"""From the bytes of an image file to a square uint8 array: decoding and the ADM crop.

Everything here is a pure function of the bytes: no EXIF rotation, no approximate JPEG scaling.

Pillow's `convert("RGB")` produces the pixels, as in the published code. It clips samples of more than 8 bits
at 255, so those are scaled by their range instead. Images that it would convert wrongly are rejected.
"""

import io
import warnings
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    YCBCRSUBSAMPLING,
    TiffImageFile,
)

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that Pillow may detect, regardless of the file name; none of them runs an external program."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 2**27
"""Largest image before or after a resize; a larger one has a damaged header or would exhaust memory."""

CROP = "adm_center"
"""Name of `center_crop` in dataset.json."""

Pixels = npt.NDArray[np.uint8]


class InputError(Exception):
    """An image that cannot be used; the message is the reason in the quarantine list of an encoding.

    The message must depend only on the input's bytes, because shard records contain it: they must not
    differ between machines or attempts.
    """


def decode(data: bytes) -> Image.Image:
    """Bytes of an image file => RGB image; InputError when they cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF, which is not used
            image = Image.open(io.BytesIO(_critical_chunks(data)), formats=FORMATS)
            _check_pixels(image.size)
            if reason := _misread(image):
                raise InputError(reason)
            return _to_rgb(image)
    except UnidentifiedImageError:
        # Pillow's own message contains an address, which differs between attempts.
        raise InputError("not an image in a known format") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many types for damaged bytes
        raise InputError(f"cannot be decoded: {error}") from None


def _critical_chunks(data: bytes) -> bytes:
    """Return a PNG without its ancillary chunks, and other data unchanged; InputError for a wrong checksum.

    Ancillary chunks do not change the color of a pixel, but Pillow rejects intact images with large
    compressed texts or color profiles. Pillow also does not check the checksums of pixel chunks.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    rest = memoryview(data)
    kept = [rest[: len(PNG_SIGNATURE)]]
    rest = rest[len(PNG_SIGNATURE) :]
    while len(rest) >= 12:  # length, name and checksum
        end = 12 + int.from_bytes(rest[:4], "big")
        name = bytes(rest[4:8])
        if end > len(rest):
            break
        if zlib.crc32(rest[4 : end - 4]) != int.from_bytes(rest[end - 4 : end], "big"):
            raise InputError(f"cannot be decoded: wrong checksum of PNG chunk {name!r}")
        if name[:1].isupper():
            kept.append(rest[:end])
        rest = rest[end:]
        if name == b"IEND":
            return b"".join(kept)
    return b"".join([*kept, rest])  # truncated; Pillow decides whether all pixels are present


def _misread(image: Image.Image) -> str:
    """Return why Pillow would read or convert these pixels wrongly; empty when it would not."""
    if isinstance(image, TiffImageFile):
        return _misread_tiff(image)
    if image.mode == "P" and image.palette is None:
        return "a palette image without its palette"
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        return "a CMYK JPEG without Adobe's marker: it is undefined whether its inks are inverted"
    return ""


def _misread_tiff(image: TiffImageFile) -> str:
    tags = image.tag_v2
    bits, kinds = tags.get(BITSPERSAMPLE, (1,)), tags.get(SAMPLEFORMAT, (1,))
    photometric = tags.get(PHOTOMETRIC_INTERPRETATION, 0)
    is_raw = image.info["compression"] == "raw"
    if 2 in kinds:
        return "signed integers, whose range is undefined; save it with 8 or 16 unsigned bits"
    if max(bits) == 32 and 1 in kinds:
        return "32-bit integers, whose range is undefined; save it with 8 or 16 bits"
    if image.mode == "F" and not is_raw and tags.prefix == b"MM":
        return "compressed big-endian floats, which Pillow misreads; save it little-endian"
    if is_raw and max(bits) == 16 and len(bits) > 1 and tags.get(PLANAR_CONFIGURATION, 1) == 2:
        return "an uncompressed TIFF of 16-bit planes, which Pillow misreads; save it as PNG"
    if is_raw and photometric == 6 and max(tags.get(YCBCRSUBSAMPLING, (2, 2))) > 1:
        return "an uncompressed TIFF of subsampled YCbCr, which Pillow misreads; save it as PNG"
    return ""


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; scale and round gray samples of 9 to 16 bits and floats from 0 to 1."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert("RGB")
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    samples = np.asarray(image)
    if image.mode == "F":
        if not (samples.min() >= 0 and samples.max() <= 1):  # false for NaN
            raise InputError(
                f"floats from {samples.min():g} to {samples.max():g}; expected 0 to 1, other ranges are "
                "undefined"
            )
        grey = np.rint(samples * np.float32(255)).astype(np.uint8)
    else:
        white = 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1  # 65535, or 4095 in some TIFFs
        grey = ((samples.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero; Pillow inverts only 8-bit samples
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")


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
