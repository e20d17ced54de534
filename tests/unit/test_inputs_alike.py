"""The same images from every kind of input: the same crops, odd ones too, and the same saved listing."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_scale.storage import open_storage
from dit_scale_pipeline.decoder import read_batch
from dit_scale_pipeline.inputs import Entry, Listing, Progress, open_input
from dit_scale_pipeline.inputs.archives import ArchiveInput
from dit_scale_pipeline.inputs.saved import current_listing, load_listing, save_listing
from tests.archives import ARCHIVES, KINDS, Images, tar_of, upload, watch_reads, write_parquet
from tests.s3 import BUCKET, s3_server

SIZE = 16


def photo(mode: str = "RGB") -> Image.Image:
    draws = np.random.default_rng(3).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    return Image.fromarray(draws).resize((53, 41)).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def adobe_cmyk() -> bytes:
    """As Photoshop saves it: inverted, with a marker that says so."""
    data = saved(photo("CMYK"), "JPEG")
    assert b"Adobe" in data[:60]
    return data


def odd_files() -> dict[str, bytes]:
    jpeg = saved(photo(), "JPEG")
    deep = Image.fromarray((np.arange(41 * 53, dtype=np.uint16) * 29).reshape(41, 53))
    broken_exif = b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xee" * 30
    return {
        "a_1.JPEG": jpeg,
        "a_2.JPEG": adobe_cmyk(),
        "a_3.JPEG": saved(photo("RGBA"), "PNG"),
        "a_4.JPEG": saved(photo("P"), "PNG", transparency=0),
        "b_1.JPEG": saved(photo("L"), "JPEG"),
        "b_2.JPEG": saved(deep, "PNG"),
        "b_3.JPEG": saved(photo(), "JPEG", exif=turned()),
        "b_4.JPEG": jpeg[:2]
        + b"\xff\xe1"
        + (len(broken_exif) + 2).to_bytes(2, "big")
        + broken_exif
        + jpeg[2:],
        "c_1.JPEG": jpeg[: len(jpeg) // 2],
        "c_2.JPEG": saved(photo(), "MPO", save_all=True, append_images=[photo("L").convert("RGB")]),
        "c_3.JPEG": saved(photo("1"), "BMP"),
        "c_4.JPEG": saved(photo("LA"), "WEBP", lossless=True),
    }


def images() -> Images:
    files = odd_files()
    return {name: {file: data for file, data in files.items() if file[0] == name} for name in "abc"}


def reference_crop(data: bytes) -> np.ndarray:
    """ADM's center_crop_arr, in its own words; 16 bits are scaled to 8 before it."""
    with Image.open(io.BytesIO(data)) as file:
        if file.mode == "I;16":
            grey = np.round(np.asarray(file) / 257).astype(np.uint8)
            image = Image.fromarray(grey).convert("RGB")
        else:
            image = file.convert("RGB")
    while min(*image.size) >= 2 * SIZE:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = SIZE / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - SIZE) // 2, (array.shape[1] - SIZE) // 2
    return array[top : top + SIZE, left : left + SIZE]


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_every_kind_of_input_gives_the_same_crops(
    where: str, server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = odd_files()
    expected = np.stack([reference_crop(data) for name, data in sorted(files.items()) if name != "c_1.JPEG"])
    for kind, make in KINDS.items():
        source = make(tmp_path / kind, images())
        if where == "s3":
            for name, value in server.items():
                monkeypatch.setenv(name, value)
            source = upload(source, f"s3://{BUCKET}/{kind}")
        listing = open_input(source).list()
        assert listing.kind == kind
        assert listing.class_names == ("a", "b", "c")
        assert listing.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        crops, account = read_batch(source, kind, listing.entries(), SIZE)
        assert np.array_equal(crops, expected), kind
        assert [(entry.key, reason) for entry, reason in account.bad] == [(8, _reason(account.bad))], kind
        assert account.bad[0][0].path == listing.paths[8]


def _reason(bad: tuple[tuple[Entry, str], ...]) -> str:
    reason = bad[0][1]
    assert "truncated" in reason
    return reason


def find(source: str, output: Path) -> Listing:
    """What a start of the job does."""
    storage = open_storage(output)
    listing = current_listing(open_input(source), load_listing(storage))
    save_listing(storage, listing)
    return listing


MANY: Images = {name: {f"{name}_{n}.JPEG": b"." * 9000 for n in range(200)} for name in ("n01", "n02")}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_are_not_walked_again_unless_they_changed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ARCHIVES[kind](tmp_path / "x", MANY)
    walks: list[str] = []
    walk = ArchiveInput.list

    def counted(self: ArchiveInput, progress: Progress) -> Listing:
        walks.append(self.url)
        return walk(self, progress)

    monkeypatch.setattr(ArchiveInput, "list", counted)
    first = find(source, tmp_path / "out")
    assert len(walks) == 1
    reads = watch_reads(monkeypatch)
    again = find(source, tmp_path / "out")
    assert len(walks) == 1
    assert len(reads.ranges) <= 16, "a look at the kind, and no walk through 400 members"
    assert again.entries() == first.entries()
    archive = sorted((tmp_path / "x").iterdir())[0]
    change(kind, archive)
    third = find(source, tmp_path / "out")
    assert len(walks) == 2
    assert third.archives != first.archives
    assert third.sha256 != first.sha256 or kind == "imagenet_tar"


def change(kind: str, archive: Path) -> None:
    """Another archive of the same name."""
    fewer: dict[str, Callable[[], bytes]] = {
        "class_tars": lambda: tar_of({"n01_7.JPEG": b"."}),
        "imagenet_tar": lambda: archive.read_bytes() + bytes(10240),
        "webdataset": lambda: tar_of({"n01_7.jpeg": b".", "n01_7.cls": b"0"}),
    }
    if kind == "parquet":
        write_parquet(archive, [({"bytes": b".", "path": ""}, 0)], ["n01", "n02"])
    else:
        archive.write_bytes(fewer[kind]())
