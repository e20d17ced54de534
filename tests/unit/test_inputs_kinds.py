"""Each kind of archive, on disk and on S3: listing, reading and errors."""

import json
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs import InputError, Listing, open_input, tars
from dit_scale_pipeline.inputs.archives import ArchiveImages, ArchiveInput, ArchiveRange
from dit_scale_pipeline.inputs.webdataset import split_name
from tests.support.archives import (
    ARCHIVES,
    KINDS,
    Images,
    class_folders,
    class_tars,
    imagenet_tar,
    parquet,
    tar_of,
    upload,
    watch_reads,
    web_dataset,
)
from tests.support.s3 import BUCKET

IMAGES: Images = {
    "n01440764": {f"n01440764_{number}.JPEG": b"one" * number for number in (1, 10, 2)},
    "n02": {f"n02_{number}.JPEG": b"two" * number for number in (7, 8, 9)},
    "n01": {"n01_5.JPEG": b"three"},
}
EMPTY: Images = {**IMAGES, "n015": {}}


@pytest.fixture(params=["disk", "s3"])
def put(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Leave a source on disk, or copy it to S3."""
    if request.param == "disk":
        return lambda source: source
    for name, value in request.getfixturevalue("server").items():
        monkeypatch.setenv(name, value)
    # With a bracket: a letter as any other, on S3 too.
    return lambda source: upload(source, f"s3://{BUCKET}/[1]/{secrets.token_hex(8)}")


def contents(source: str, listing: Listing) -> list[bytes]:
    images = open_input(source, listing.kind)
    return [images.read(entry) for entry in listing.entries()]


def rows_of(listing: Listing) -> list[tuple[str, int]]:
    return list(zip(listing.paths, listing.labels.tolist(), strict=True))


@pytest.mark.parametrize("make", [imagenet_tar, class_tars])
def test_class_tars_are_the_class_folders_they_would_unpack_to(
    make: Callable[[Path, Images], str], put: Callable[[str], str], tmp_path: Path
) -> None:
    folders = class_folders(tmp_path / "folders", EMPTY)
    expected = open_input(folders).list()
    source = put(make(tmp_path / "tars", EMPTY))
    listing = open_input(source).list()
    assert listing.kind == make.__name__
    assert rows_of(listing) == rows_of(expected)
    assert listing.class_names == expected.class_names == ("n01", "n01440764", "n015", "n02")
    assert listing.empty_classes == ("n015",)
    assert listing.sha256 == expected.sha256
    assert contents(source, listing) == contents(folders, expected)


def test_webdataset_samples_have_the_labels_of_their_members(
    put: Callable[[str], str], tmp_path: Path
) -> None:
    source = put(web_dataset(tmp_path / "tars", IMAGES))
    listing = open_input(source).list()
    assert listing.kind == "webdataset"
    assert listing.class_names == ("n01", "n01440764", "n02")
    assert rows_of(listing) == [
        ("train-0000.tar/n01440764_1.jpeg", 1),
        ("train-0000.tar/n01440764_10.jpeg", 1),
        ("train-0000.tar/n01_5.jpeg", 0),
        ("train-0001.tar/n01440764_2.jpeg", 1),
        ("train-0001.tar/n02_7.jpeg", 2),
        ("train-0001.tar/n02_8.jpeg", 2),
        ("train-0001.tar/n02_9.jpeg", 2),
    ]
    assert [archive.name for archive in listing.archives] == ["train-0000.tar", "train-0001.tar"]
    assert contents(source, listing)[3:5] == [b"oneone", b"two" * 7]


def test_webdataset_groups_as_its_package_does(tmp_path: Path) -> None:
    names = [
        "a.jpg",
        "a.cls",
        "x/a.cls",
        "x/a.JPG",
        "b.seg.png",
        "b.cls",
        "b.jpg",
        "x.y/c.png",
        "x.y/c.cls",
        "d.jpg",
    ]
    data = {name: b"7" if name.endswith("cls") else name.encode() for name in (*names, "d.json")}
    data["d.json"] = b'{"label": 3, "class_name": null}'
    data |= {"README": b"words", ".hidden": b"", "__meta__/x.json": b"{}"}
    (tmp_path / "a.tar").write_bytes(tar_of(data))
    with open(tmp_path / "a.tar", "rb") as file:
        theirs = list(group_by_keys(tar_file_expander([{"url": "a.tar", "stream": file}])))
    expected = {sample["__key__"]: sample.get("jpg", sample.get("png")) for sample in theirs}
    source = str(tmp_path / "a.tar")
    listing = open_input(source).list()
    assert (
        dict(zip([path[6:-4] for path in listing.paths], contents(source, listing), strict=True)) == expected
    )
    assert dict(rows_of(listing)) == {
        "a.tar/a.jpg": 7,
        "a.tar/b.jpg": 7,
        "a.tar/d.jpg": 3,
        "a.tar/x.y/c.png": 7,
        "a.tar/x/a.JPG": 7,
    }
    assert listing.class_names == tuple(map(str, range(8)))
    assert listing.ignored == ("a.tar/.hidden", "a.tar/README", "a.tar/__meta__/x.json")


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.B.JPG", "x.y/a.jpg", "x/a.", "a", "x.y/a", ".a.jpg", "x/y/a.b/c.d"]
)
def test_keys_are_those_of_the_webdataset_package(name: str) -> None:
    key, suffix = base_plus_ext(name)
    assert split_name(name) == ((key, suffix.lower()) if key else ("", ""))


def test_hidden_files_are_of_no_sample() -> None:
    assert split_name("x/._a.jpg") == ("", "")


def test_a_webdataset_sample_without_an_image_is_listed_and_is_a_bad_input(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"a.jpg": b"1", "a.cls": b"0", "b.txt": b"2", "b.cls": b"1"}))
    images = open_input(str(tmp_path))
    listing = images.list()
    assert rows_of(listing) == [("a.tar/a.jpg", 0), ("a.tar/b", 1)]
    with pytest.raises(InputError, match="the sample has no image"):
        images.read(listing.entries()[1])


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ({"b.jpg": b"2"}, "expected a label, got only"),
        ({"b.jpg": b"2", "b.txt": b"cat"}, r"got only b.jpg, b.txt.*a caption \(.txt\), as"),
        ({"b.jpg": b"2", "b.json": b'{"label": true}'}, '"label" in .json is true; expected an integer'),
        ({"b.jpg": b"2", "b.json": b'{"label": "1"}'}, '"label" in .json is "1"; expected an integer'),
        ({"b.0.jpg": b"2", "b.0.cls": b"1"}, r"got only b.0.jpg, b.0.cls. The key .* first dot"),
        ({"b.0.jpg": b"2", "b.1.jpg": b"2", "b.cls": b"1"}, r"got b.0.jpg, b.1.jpg.*ends at the first dot"),
        ({"b.jpg": b"2", "b.json": b"{"}, r"\.json is not valid JSON"),
        ({"b.jpg": b"2", "b.cls": b"cat"}, r"\.cls is b'cat'; expected a decimal number"),
        ({"b.jpg": b"2", "b.cls": b"-1"}, "label -1; expected a class number"),
        ({"b.jpg": b"2", "b.cls": b"99999999"}, "expected a class number"),
        ({"b.jpg": b"2", "b.cls": b"1", "b.json": b'{"label": 2}'}, r"expected one label, got \[1, 2\]"),
        ({"b.jpg": b"2", "b.png": b"2", "b.cls": b"1"}, "expected one image, got b.jpg, b.png"),
        ({"b.jpg": b"2", "b.JPG": b"2", "b.cls": b"1"}, "two .jpg members"),
        (
            {"b.jpg": b"2", "b.json": b'{"label": 0, "class_name": "y"}'},
            "label 0 is class 'y', but 'x' in an earlier",
        ),
    ],
)
def test_a_webdataset_sample_that_is_none_is_named(
    sample: dict[str, bytes], why: str, tmp_path: Path
) -> None:
    first = {"a.jpg": b"1", "a.json": b'{"label": 0, "class_name": "x"}'}
    (tmp_path / "a.tar").write_bytes(tar_of(first | sample))
    with pytest.raises(DataError, match=f"sample b in a.tar.*{why}"):
        open_input(str(tmp_path)).list()


@pytest.mark.parametrize(
    ("members", "why"),
    [
        (
            {"a.0.jpg": b"1", "a.0.cls": b"0", "a.1.jpg": b"1", "a.1.cls": b"0"},
            "got only a.0.jpg, a.0.cls",
        ),
        ({"a.v0.jpg": b"1", "a.v1.jpg": b"1", "a.cls": b"0"}, "expected one image, got a.v0.jpg, a.v1.jpg"),
    ],
)
def test_dots_in_keys_are_named(members: dict[str, bytes], why: str, tmp_path: Path) -> None:
    (tmp_path / "train-000.tar").write_bytes(tar_of(members))
    with pytest.raises(
        DataError, match=rf"sample a in train-000.tar: .*{why}.* The key of a sample ends at the"
    ):
        open_input(str(tmp_path)).list()


def test_an_only_image_may_have_a_suffix_of_two_parts(tmp_path: Path) -> None:
    members = {
        f"{n}.{kind}": data for n in range(2) for kind, data in (("image.jpg", b"1"), ("cls", b"%d" % n))
    }
    (tmp_path / "train-000.tar").write_bytes(tar_of(members | {"1.mask.png": b"2", "1.jpg": b"3"}))
    listing = open_input(str(tmp_path)).list()
    assert rows_of(listing) == [("train-000.tar/0.image.jpg", 0), ("train-000.tar/1.jpg", 1)]
    assert contents(str(tmp_path), listing) == [b"1", b"3"]


def test_archives_of_two_data_sets_do_not_mix(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        facts = json.dumps({"label": 0, "class_name": name}).encode()
        (tmp_path / f"{number}.tar").write_bytes(tar_of({"a.jpg": b"1", "a.json": facts}))
    with pytest.raises(DataError, match="label 0 is class 'cat' in one archive and 'dog' in another"):
        open_input(str(tmp_path)).list()


def test_what_is_no_tar_of_images_of_one_class_is_refused(tmp_path: Path) -> None:
    class_tars(tmp_path / "c", IMAGES)
    for member in ("n03_1.tar", "n03_1.cls"):
        (tmp_path / "c/n03.tar").write_bytes(tar_of({"n03_1.JPEG": b"", member: b""}))
        with pytest.raises(DataError, match=f"the tar of class n03 contains {member}"):
            open_input(str(tmp_path / "c"), "class_tars").list()


def test_two_class_tars_of_one_class_are_refused_and_other_members_reported(tmp_path: Path) -> None:
    inner = tar_of({"a.JPEG": b"1"})
    path = tmp_path / "all.tar"
    path.write_bytes(tar_of({"train/n01.tar": inner, "train/README": b"", "n02.tar": inner}))
    listing = open_input(str(path)).list()
    assert rows_of(listing) == [("n01/a.JPEG", 0), ("n02/a.JPEG", 1)]
    assert listing.ignored == ("all.tar/train/README",)
    path.write_bytes(tar_of({"train/n01.tar": inner, "val/n01.tar": inner}))
    with pytest.raises(DataError, match="two tars of the same class"):
        open_input(str(path)).list()


def test_parquet_rows_are_read_with_the_labels_and_names_of_the_file(
    put: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {name: {f"{name}_{n}.JPEG": os.urandom(40_000) for n in range(8)} for name in ("cat", "dog")}
    source = put(parquet(tmp_path / "p", images, rows_per_group=4))
    reads = watch_reads(monkeypatch)
    listing = open_input(source).list()
    assert reads.bytes < 200_000, "no image is read"
    assert len(reads.ranges) <= 2 * (1 + 2)
    assert reads.whole == []
    assert listing.kind == "parquet"
    assert listing.class_names == ("cat", "dog")
    assert rows_of(listing) == [
        (f"train-0000{file}-of-00002.parquet/{row:08d}", file) for file in (0, 1) for row in range(8)
    ]
    reads.clear()
    expected = [data for name in ("cat", "dog") for _, data in sorted(images[name].items())]
    assert contents(source, listing) == expected
    assert len(reads.ranges) <= 2 * (1 + 2 * 2), "a footer, and at most two reads for each row group"
    backwards = open_input(source, "parquet")
    assert [backwards.read(entry) for entry in reversed(listing.entries())] == expected[::-1]


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_are_listed_side_by_side(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = KINDS[kind](tmp_path / "x", {name: IMAGES[name] for name in ("n01", "n02")})
    both = threading.Barrier(2)
    cls = type(open_input(source))
    list_archive = cls.list_archive

    def together(self: ArchiveInput, part: ArchiveRange) -> ArchiveImages:
        both.wait(60)
        return list_archive(self, part)

    monkeypatch.setattr(cls, "list_archive", together)
    assert len(open_input(source).list()) == 4


def test_of_webdataset_tars_on_s3_everything_is_fetched_once(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tars, "REMOTE_WINDOW_BYTES", 50 * 2**10)
    images = {"n01": {f"n01_{m:03d}.JPEG": b"." * 10_000 for m in range(200)}}
    folder = web_dataset(tmp_path / "x", images)
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    source = upload(folder, f"s3://{BUCKET}/{secrets.token_hex(8)}")
    reads = watch_reads(monkeypatch)
    assert len(open_input(source, "webdataset").list()) == 200
    assert reads.bytes <= size
    assert len(reads.ranges) <= size / (50 * 2**10) + 2


def test_of_a_tar_of_tars_on_s3_everything_is_fetched_once(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    images = {f"n0{n}": {f"n0{n}_{m}.JPEG": b"." * 30_000 for m in range(10)} for n in range(4)}
    source = upload(imagenet_tar(tmp_path / "x", images), f"s3://{BUCKET}/{secrets.token_hex(8)}")
    size = (tmp_path / "x/ILSVRC2012_img_train.tar").stat().st_size
    reads = watch_reads(monkeypatch)
    listing = open_input(source, "imagenet_tar").list()
    assert len(listing) == 40
    assert reads.bytes < 1.1 * size
    assert len(reads.ranges) <= 4 + 6, "a window for each class tar; headers and end mark of the outer one"


@pytest.mark.parametrize("kind", ARCHIVES)
def test_progress_counts_the_archives(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind](tmp_path / "x", IMAGES)
    seen: list[tuple[int, int]] = []
    open_input(source).list(lambda done, total: seen.append((done, total)))
    total = 3 if kind in ("class_tars", "imagenet_tar") else 2
    assert seen == [(done, total) for done in range(total + 1)]


def test_archives_without_an_image_are_refused(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tar_of({}))
    with pytest.raises(DataError, match="2 archives contain no image"):
        open_input(str(tmp_path)).list()


def test_an_archive_that_is_cut_off_is_no_shorter_listing(put: Callable[[str], str], tmp_path: Path) -> None:
    for kind, make in ARCHIVES.items():
        folder = tmp_path / kind
        make(folder, IMAGES)
        last = sorted(folder.iterdir())[-1]
        last.write_bytes(last.read_bytes()[:600])
        with pytest.raises(DataError, match=last.stem):
            open_input(put(str(folder)), kind).list()
