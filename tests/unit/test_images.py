"""Decoding and the ADM crop."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_scale.data.pixels import center_crop, decode, to_array
from dit_scale_pipeline.decoder import read_batch
from dit_scale_pipeline.inputs import Entry, InputError, open_input
from tests.support.adm_crop import adm_crop


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    draws = np.random.default_rng([width, height])
    small = draws.integers(0, 256, (min(height, 40), min(width, 40), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([8, 32, 64, 100]))
@example(64, 64, 32)
@example(63, 300, 32)
@example(65, 129, 64)
@example(500, 375, 64)
@settings(max_examples=60, deadline=None)
def test_the_crop_is_adms_bit_for_bit(width: int, height: int, size: int) -> None:
    image = picture(width, height)
    array = to_array(center_crop(image, size))
    assert array.shape == (size, size, 3)
    assert array.dtype == np.uint8
    assert np.array_equal(array, adm_crop(image, size))


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = picture(64, 64)
    assert np.array_equal(to_array(center_crop(image, 64)), np.array(image))


def test_a_strip_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(InputError, match="too large: 2560000 x 256"):
        center_crop(Image.new("RGB", (10000, 1)), 256)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = picture(30, 20) if mode == "I;16" else picture(30, 20, mode)
    if mode == "I;16":
        image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30))
    kind = {"CMYK": "JPEG"}.get(mode, "PNG")
    assert decode(encoded(image, kind)).mode == "RGB"


def test_contents_count_not_the_name_and_exif_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    image = picture(40, 24)
    (tmp_path / "a/x.JPEG").write_bytes(encoded(image, "PNG"))
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "a/y.png").write_bytes(encoded(image, "PNG", exif=turned))
    listing = open_input(str(tmp_path)).list()
    pixels, account = read_batch(str(tmp_path), listing.kind, listing.entries(), 24)
    assert [entry.path for entry in account.decoded] == ["a/x.JPEG", "a/y.png"]
    assert np.array_equal(pixels[0], pixels[1])
    assert np.array_equal(pixels[0], np.array(image)[:, 8:32])


def test_damaged_files_have_reasons_without_addresses() -> None:
    jpeg, png = encoded(picture(50, 50), "JPEG"), encoded(picture(50, 50), "PNG")
    for data, reason in (
        (b"", "not an image in a known format"),
        (b"hello", "not an image in a known format"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (png[: len(png) // 2], "cannot be decoded"),
        (png[:60] + bytes(50) + png[110:], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
    ):
        reasons = set()
        for _ in range(2):
            with pytest.raises(InputError, match=reason) as caught:
                decode(data)
            reasons.add(str(caught.value))
        assert len(reasons) == 1
        assert "0x" not in reasons.pop()


def test_a_batch_accounts_for_every_entry(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    picture(20, 20).save(tmp_path / "c/b.png")
    (tmp_path / "c/a.jpg").write_text("words")
    (tmp_path / "c/c.png").write_bytes(b"")
    (tmp_path / "c/d.png").symlink_to(tmp_path / "gone")
    listing = open_input(str(tmp_path)).list()
    pixels, account = read_batch(str(tmp_path), listing.kind, listing.entries(), 8)
    assert pixels.shape == (1, 8, 8, 3)
    assert account.decoded == (Entry(1, "c/b.png", 0),)
    assert [(entry.path, reason) for entry, reason in account.rejected] == [
        ("c/a.jpg", "not an image in a known format"),
        ("c/c.png", "not an image in a known format"),
        ("c/d.png", "a broken symbolic link"),
    ]
    pixels, account = read_batch(str(tmp_path), listing.kind, listing.entries(range(1)), 8)
    assert pixels.shape == (0, 8, 8, 3)
    assert not account.decoded
