"""Samples of more than 8 bits, and images that Pillow would convert wrongly or not read."""

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from dit_scale.data.pixels import decode
from dit_scale_pipeline.inputs import InputError

Samples = npt.NDArray[np.generic]
HEIGHT, WIDTH = 6, 8
RAMP16 = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
RAMP8 = np.array([[round(value / 257) for value in row] for row in RAMP16.tolist()], np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def grey(data: bytes) -> npt.NDArray[np.uint8]:
    """Return (H, W) of an image whose three channels must be equal."""
    pixels = np.asarray(decode(data))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def tiff(
    samples: Samples, order: str = "<", compressed: bool = False, **tags: int | tuple[int, ...]
) -> bytes:
    """A TIFF of one strip with samples (H, W) or (H, W, C); `tags` are named by their numbers, as `t262`."""
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()  # type: ignore[arg-type]
    if compressed:
        data = zlib.compress(data)
    bands = samples.shape[2] if samples.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    values: dict[int, tuple[int, ...]] = {
        256: (WIDTH,),
        257: (HEIGHT,),
        258: (samples.dtype.itemsize * 8,) * bands,
        259: (8 if compressed else 1,),
        262: (1 if bands == 1 else 2,),
        273: (8,),
        277: (bands,),
        278: (HEIGHT,),
        279: (len(data),),
        339: (kind,) * bands,
    }
    for name, value in tags.items():
        values[int(name[1:])] = value if isinstance(value, tuple) else (value,)
    extra_at = 8 + len(data) + 2 + 12 * len(values) + 4
    entries, extra = b"", b""
    for number, value in sorted(values.items()):
        packed = struct.pack(f"{order}{len(value)}H", *value)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", extra_at + len(extra)), extra + packed
        entries += struct.pack(f"{order}HHI", number, 3, len(value)) + packed.ljust(4, b"\0")
    header = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(data))
    return header + data + struct.pack(f"{order}H", len(values)) + entries + bytes(4) + extra


def test_the_writer_of_these_tests_makes_what_pillow_reads() -> None:
    for order in "<>":
        assert np.array_equal(grey(tiff(RAMP8, order)), RAMP8)
        assert np.array_equal(grey(tiff(RAMP8, order, compressed=True)), RAMP8)
        color = np.stack([RAMP8, 255 - RAMP8, RAMP8 // 2], axis=2)
        assert np.array_equal(np.asarray(decode(tiff(color, order))), color)


# Scaled by their range


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_16_bits_are_divided_by_257_and_rounded(values: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.uint16))
    expected = [int(value / 257 + 0.5) for value in values]
    for data in (encoded(image, "PNG"), encoded(image, "TIFF"), encoded(image, "PPM")):
        assert grey(data)[0].tolist() == expected


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_16_bit_tiff_of_either_byte_order(order: str, compressed: bool) -> None:
    assert np.array_equal(grey(tiff(RAMP16, order, compressed)), RAMP8)


def test_12_bits_are_scaled_by_their_own_range() -> None:
    pairs = np.array([[0x000, 0xFFF], [0x800, 0x001]] * 12)  # 48 samples, two in three bytes
    packed = bytes(byte for a, b in pairs.tolist() for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))
    data = tiff(np.frombuffer(packed, np.uint8), t258=12, t277=1, t262=1)
    assert grey(data).ravel().tolist() == [0, 255, 128, 0] * 12


def test_where_white_is_zero() -> None:
    assert np.array_equal(grey(tiff(RAMP8, t262=0)), 255 - RAMP8)
    assert np.array_equal(grey(tiff(RAMP16, t262=0)), 255 - RAMP8)
    floats = np.linspace(0, 1, 48, dtype=np.float32).reshape(HEIGHT, WIDTH)
    assert np.array_equal(grey(tiff(floats, t262=0)), 255 - np.rint(floats * 255))


def test_a_pgm_is_scaled_by_its_largest_value() -> None:
    header, values = b"P5\n3 1\n1023\n", np.array([0, 512, 1023], ">u2").tobytes()
    assert grey(header + values).tolist() == [[0, 128, 255]]
    assert grey(b"P2\n3 1\n1023\n0 512 1023\n").tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("kind", ["TIFF", "PPM"])
def test_floats_from_0_to_1(kind: str) -> None:
    values = np.array([[0, 0.5, 1], [1 / 255, 0.2, 0.999]], np.float32)
    assert grey(encoded(Image.fromarray(values), kind)).tolist() == [[0, 128, 255], [1, 51, 255]]


@pytest.mark.parametrize("wrong", [-0.001, 1.001, 255.0, float("nan"), float("inf")])
def test_other_floats_are_refused(wrong: float) -> None:
    values = np.array([[0, wrong, 1]], np.float32)
    with pytest.raises(InputError, match=r"^floats from .* to .*; expected 0 to 1"):
        decode(encoded(Image.fromarray(values), "TIFF"))


def test_16_bit_colors_lose_their_low_byte_as_pillow_has_it() -> None:
    color = np.stack([RAMP16, 65535 - RAMP16, RAMP16 // 2], axis=2)
    assert np.array_equal(np.asarray(decode(tiff(color))), color >> 8)
    rows = b"".join(b"\0" + row.tobytes() for row in color.astype(">u2"))
    assert np.array_equal(np.asarray(decode(png(16, 2, rows))), color >> 8)


# What is refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(RAMP8.view(np.int8)), "signed integers"),
        (tiff(RAMP16.view(np.int16)), "signed integers"),
        (tiff(RAMP16.astype(np.int32)), "signed integers"),
        (tiff(RAMP16.astype(np.uint32)), "32-bit integers"),
        (tiff(np.stack([RAMP16] * 3, 2), t284=2, t273=(8, 104, 200), t279=(96,) * 3), "16-bit planes"),
        (tiff(np.stack([RAMP8] * 3, 2), t262=6), "subsampled YCbCr"),
        (tiff(RAMP8.astype(np.float32) / 255, ">", compressed=True), "big-endian floats"),
        (tiff(np.stack([RAMP8] * 2, 2), t262=1, t338=1), "cannot be decoded: conversion from La"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tiffs_that_pillow_would_read_or_convert_wrongly(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        decode(data)


def test_ycbcr_without_subsampling_is_read() -> None:
    assert (
        np.abs(
            grey(tiff(np.stack([RAMP8, *[np.full_like(RAMP8, 128)] * 2], 2), t262=6, t530=(1, 1))) - RAMP8
        ).max()
        == 0
    )


def test_a_cmyk_jpeg_without_adobes_marker_is_refused() -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[..., 0] = 200
    data = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    red, green, blue = np.asarray(decode(data))[8, 8].tolist()
    assert (abs(red - 55) < 4, green > 251, blue > 251) == (True, True, True)
    at = data.index(b"\xff\xee")
    assert data[at + 4 : at + 9] == b"Adobe"
    with pytest.raises(InputError, match="CMYK JPEG without Adobe's marker"):
        decode(data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :])


# PNG


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(bits: int, color: int, rows: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, color, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")


ROWS8 = b"".join(b"\0" + row.tobytes() for row in RAMP8)
BOMB = zlib.compress(bytes(100_000_000))
FRAME = struct.pack(">IIIIIHHBB", 7, WIDTH, HEIGHT, 0, 0, 0, 0, 0, 0)
"""Chunk of an animation with a sequence number out of order."""


@pytest.mark.parametrize(
    "ancillary",
    [
        chunk(b"tEXt", b"parameters\0" + b"a" * 3_000_000),
        chunk(b"zTXt", b"parameters\0\0" + BOMB),
        chunk(b"iTXt", b"parameters\0\1\0\0\0" + BOMB),
        chunk(b"iCCP", b"profile\0\0" + BOMB),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000))) * 80,
        chunk(b"tEXt", b"transparency\0white"),
        chunk(b"tEXt", b"bbox\0white"),
        chunk(b"tRNS", b"\0"),
        chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", FRAME),
        chunk(b"eXIf", b"no Exif"),
    ],
    ids=["text", "ztext", "itext", "profile", "many", "transparency", "bbox", "tRNS", "animation", "exif"],
)
def test_ancillary_chunks_neither_stop_nor_change_a_picture(ancillary: bytes) -> None:
    for data in (png(8, 0, ROWS8, before=ancillary), png(8, 0, ROWS8, after=ancillary)):
        assert np.array_equal(grey(data), RAMP8)


def test_texts_that_pillow_wrote() -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a" * 3_000_000, zip=True)
    assert np.array_equal(grey(encoded(Image.fromarray(RAMP8), "PNG", pnginfo=texts)), RAMP8)


def test_every_flipped_bit_of_a_png_is_found() -> None:
    """Also without compression, where Pillow assumes another layout."""
    data = encoded(Image.fromarray(RAMP8), "PNG", compress_level=0)
    for at in range(8, len(data)):
        for bit in range(8):
            flipped = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            try:
                assert np.array_equal(grey(flipped), RAMP8), (at, bit)
            except InputError:
                continue


def test_a_png_that_ends_behind_its_pixels_is_read_and_a_shorter_one_is_not() -> None:
    data = png(8, 0, ROWS8)
    assert np.array_equal(grey(data[:-12]), RAMP8)
    with pytest.raises(InputError, match="cannot be decoded"):
        decode(data[:-40])


def test_a_palette_picture_without_its_palette_is_refused() -> None:
    with pytest.raises(InputError, match="without its palette"):
        decode(png(8, 3, ROWS8))
    palette = chunk(b"PLTE", bytes(value for index in range(256) for value in [index] * 3))
    assert np.array_equal(grey(png(8, 3, ROWS8, palette)), RAMP8)


def test_alpha_and_transparency_are_dropped_as_pillow_has_it() -> None:
    color = np.stack([RAMP8, 255 - RAMP8, RAMP8 // 2], axis=2)
    seen = np.concatenate([color, np.zeros((HEIGHT, WIDTH, 1), np.uint8)], axis=2)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(seen), kind))), color)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "MPO", "TIFF"])
def test_of_an_animation_the_first_picture_counts(kind: str) -> None:
    white, black = Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16), "black")
    data = encoded(white, kind, save_all=True, append_images=[black])
    assert np.asarray(decode(data)).min() >= 254
