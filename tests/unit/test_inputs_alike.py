"""The same images from every kind of input: same crops, including unusual images, and same saved listing."""

import io
import os
import secrets
import tarfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_scale.storage import open_storage
from dit_scale_pipeline.decoder import read_batch
from dit_scale_pipeline.inputs import Entry, Listing, ListingProgress, open_input
from dit_scale_pipeline.inputs.archives import ArchiveInput
from dit_scale_pipeline.inputs.saved import current_listing, load_listing, save_listing
from tests.support.archives import ARCHIVES, KINDS, Images, tar_of, upload, watch_reads, write_parquet
from tests.support.s3 import BUCKET

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
    """Encode like Photoshop: inverted, with Adobe's marker."""
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
    """ADM's center_crop_arr, copied; 16-bit samples are scaled to 8 bits first."""
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
        assert [(entry.key, reason) for entry, reason in account.rejected] == [
            (8, _reason(account.rejected))
        ], kind
        assert account.rejected[0][0].path == listing.paths[8]


def _reason(bad: tuple[tuple[Entry, str], ...]) -> str:
    reason = bad[0][1]
    assert "truncated" in reason
    return reason


def find(source: str, output: Path) -> Listing:
    """List the source like an attempt of the job."""
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

    def counted(self: ArchiveInput, progress: ListingProgress) -> Listing:
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


HIDDEN = (
    *(".DS_Store", "._0.jpg", "@eaDir/0.jpg/S_M.jpg", ".git/x.jpg", "Thumbs.db", "sub/desktop.ini"),
    *("boxes.TXT", "sub/0.jpg.xml"),
)
HIDDEN_TOPS = (".ipynb_checkpoints", "__MACOSX", "$RECYCLE.BIN", ".Trash-1000", "System Volume Information")
files = st.sets(st.sampled_from((*HIDDEN, "1.jpg", "sub/2.jpg", "sub/sub/3.jpg")))
trees = st.builds(
    lambda classes, hidden: {
        **{name: dict.fromkeys({"0.jpg", *inside}, b".") for name, inside in classes.items()},
        **{name: {"0.jpg": b".", "1.jpg": b"."} for name in hidden},
    },
    st.dictionaries(st.sampled_from(("n01", "n02", "a b", "\u00e9", "#", "MACOSX")), files, min_size=1),
    st.sets(st.sampled_from(HIDDEN_TOPS)),
)


@settings(max_examples=8, deadline=None)
@given(tree=trees)
def test_hidden_names_are_left_out_of_every_kind_of_input(server: dict[str, str], tree: Images) -> None:
    names = sorted(set(tree) - set(HIDDEN_TOPS), key=os.fsencode)
    expected = sorted(f"{n}/{path}" for n in names for path in tree[n] if path not in HIDDEN)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in server.items():
            patch.setenv(name, value)
        top = Path(folder)
        sources = {kind: KINDS[kind](top / kind, tree) for kind in ("class_tars", "imagenet_tar")}
        for class_name, inside in tree.items():
            for path, data in inside.items():
                (top / "folders" / class_name / path).parent.mkdir(parents=True, exist_ok=True)
                (top / "folders" / class_name / path).write_bytes(data)
        sources["folders"] = str(top / "folders")
        sources["s3"] = upload(sources["folders"], f"s3://{BUCKET}/{secrets.token_hex(8)}")
        listings = {where: open_input(source).list() for where, source in sources.items()}
    for where, listing in listings.items():
        assert listing.paths == sorted(expected, key=os.fsencode), where
        assert listing.class_names == tuple(names), where
        assert listing.sha256 == listings["folders"].sha256, where
        assert listing.labels.tolist() == listings["folders"].labels.tolist(), where
    hidden = {f"{n}/{path}" for n in names for path in tree[n] if path in HIDDEN}
    left_out = {path for path in hidden if any(path.startswith(one) for one in listings["s3"].ignored)}
    assert left_out == hidden, "what is left out is said"
    assert listings["s3"].ignored == listings["folders"].ignored
    assert bool(listings["class_tars"].ignored) == bool(listings["s3"].ignored)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_hidden_members_and_archives_are_left_out(kind: str, tmp_path: Path) -> None:
    source = Path(ARCHIVES[kind](tmp_path / "x", images()))
    expected = open_input(str(source)).list()
    first = sorted(source.iterdir())[0]
    (source / f"._{first.name}").write_bytes(b"\0\5\26\7")
    (source / ".ipynb_checkpoints").mkdir()
    ignored = [f"._{first.name}", ".ipynb_checkpoints/"]
    if kind == "webdataset":
        mac = {"__MACOSX/._a.jpg": b"\0", ".git/b.jpg": b"\0", "@eaDir/c.jpg": b"\0", "@eaDir/c.cls": b"0"}
        with tarfile.open(first) as tar:
            members = {member.name: tar.extractfile(member) for member in tar.getmembers()}
            first.write_bytes(tar_of(mac | {name: file.read() for name, file in members.items() if file}))
        ignored += [f"{first.name}/{folder}/" for folder in (".git", "@eaDir", "__MACOSX")]
    for place, said in ((str(source), ignored), (f"{source}/*{first.suffix}", ignored[2:])):
        listing = open_input(place).list()
        assert listing.sha256 == expected.sha256
        assert listing.ignored == tuple(said)


def change(kind: str, archive: Path) -> None:
    """Replace an archive by another of the same name."""
    fewer: dict[str, Callable[[], bytes]] = {
        "class_tars": lambda: tar_of({"n01_7.JPEG": b"."}),
        "imagenet_tar": lambda: archive.read_bytes() + bytes(10240),
        "webdataset": lambda: tar_of({"n01_7.jpeg": b".", "n01_7.cls": b"0"}),
    }
    if kind == "parquet":
        write_parquet(archive, [({"bytes": b".", "path": ""}, 0)], ["n01", "n02"])
    else:
        archive.write_bytes(fewer[kind]())
