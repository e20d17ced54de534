"""Detection of the kind of input, and how many reads it needs."""

from pathlib import Path

import pytest

from dit_scale.errors import DataError
from dit_scale.storage import open_storage
from dit_scale_pipeline.inputs import open_input
from tests.support.archives import ARCHIVES, KINDS, Images, tar_of, upload, watch_reads, web_dataset
from tests.support.s3 import BUCKET

IMAGES: Images = {
    "n01": {f"n01_{number}.JPEG": b"1" * 5000 for number in range(30)},
    "n02": {f"n02_{number}.JPEG": b"2" * 5000 for number in range(30)},
}


@pytest.fixture
def s3(server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_seen_at_a_glance(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = KINDS[kind](tmp_path / "x", IMAGES)
    reads = watch_reads(monkeypatch)
    assert open_input(source).kind == kind
    assert len(reads.ranges) <= 16
    assert reads.bytes <= 16 * 4096
    assert reads.listed == reads.whole == [], "nothing is walked"
    reads.clear()
    assert open_input(source, kind).kind == kind
    assert reads.ranges == [], "nothing is read when the kind is known"


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_seen_at_a_glance_on_s3(
    kind: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = upload(KINDS[kind](tmp_path / "x", IMAGES), s3)
    reads = watch_reads(monkeypatch)
    assert open_input(source).kind == kind
    assert len(reads.ranges) <= 1
    assert len(reads.listed) <= 1
    reads.clear()
    assert open_input(source, kind).kind == kind
    assert reads.ranges == reads.listed == [], "no request when the kind is known"


@pytest.mark.parametrize("kind", ["class_tars", "webdataset", "parquet"])
def test_archives_are_named_by_a_pattern_or_one_by_one(kind: str, s3: str, tmp_path: Path) -> None:
    folder = Path(ARCHIVES[kind](tmp_path / "x[1]", IMAGES))
    suffix = sorted(folder.iterdir())[0].suffix
    names = sorted(path.name for path in folder.iterdir())
    upload(str(folder), s3)
    for place in (str(folder), s3, f"file://{folder}"):
        whole = open_input(place).list()
        assert [archive.name for archive in whole.archives] == names
        assert open_input(f"{place}/").list().sha256 == whole.sha256
        assert open_input(f"{place}/*{suffix}").list().sha256 == whole.sha256
        assert [one.name for one in open_input(f"{place}/*1*{suffix}").archives()] == [
            n for n in names if "1" in n
        ]
        if kind != "class_tars":
            assert [one.name for one in open_input(f"{place}/{names[1]}").archives()] == [names[1]]


def test_paths_may_be_relative_links_and_have_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path(web_dataset(tmp_path / "real", IMAGES))
    (tmp_path / "a[bc]*").mkdir()
    for path in real.iterdir():
        (tmp_path / "a[bc]*" / path.name.replace("train", "[t]")).symlink_to(path)
    (tmp_path / "link").symlink_to(tmp_path / "a[bc]*", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    expected = open_input(str(real)).list()
    for source in ("a[bc]*", "link", "a[bc]*/*.tar", "link/[t]-*.tar", "./link/"):
        listing = open_input(source).list()
        assert len(listing) == len(expected)
        assert listing.archives[0].bytes == expected.archives[0].bytes > 0
    monkeypatch.chdir(real)
    assert len(open_input("*.tar").list()) == len(expected)
    assert len(open_input("train-0001.tar").list()) < len(expected)
    with pytest.raises(DataError, match=r"no such \.tar or \.parquet file"):
        open_input("[t]rain-*.tar")


def test_other_files_beside_the_archives_are_reported(s3: str, tmp_path: Path) -> None:
    folder = Path(web_dataset(tmp_path / "x", IMAGES))
    for name in ("README.md", "_info.json", ".gitattributes"):
        (folder / name).touch()
    (folder / ".cache").mkdir()
    (folder / ".cache/x").touch()
    for source in (str(folder), upload(str(folder), s3)):
        ignored = (".cache/", ".gitattributes", "README.md", "_info.json")
        assert open_input(source).list().ignored == ignored
    assert open_input(f"{folder}/*.tar").list().ignored == ()


def test_several_sets_in_one_folder_are_to_be_named(s3: str, tmp_path: Path) -> None:
    folder = Path(web_dataset(tmp_path / "x", IMAGES))
    for number in range(3):
        (folder / f"validation-{number}.tar").write_bytes((folder / "train-0000.tar").read_bytes())
    for source in (str(folder), upload(str(folder), s3)):
        for name in (source, f"{source}/*.tar"):
            with pytest.raises(
                DataError, match=r"archives of 2 data sets \(2 train-\*.tar, 3 validation-\*.tar\)"
            ) as caught:
                open_input(name)
            assert f"{source}/train-*.tar" in str(caught.value)
        assert len(open_input(f"{source}/train-*.tar").archives()) == 2


def test_different_things_side_by_side_are_refused(s3: str, tmp_path: Path) -> None:
    folder = Path(web_dataset(tmp_path / "x", IMAGES))
    (folder / "n01").mkdir()
    (folder / "n01/a.JPEG").touch()
    for source in (str(folder), upload(str(folder), s3)):
        with pytest.raises(DataError, match=r"archives and folders \(n01\) in the same place"):
            open_input(source)
        assert open_input(f"{source}/*.tar").kind == "webdataset"
    (folder / "a.parquet").touch()
    with pytest.raises(DataError, match="tars and Parquet files in the same place"):
        open_input(str(folder))


def test_the_downloads_of_imagenet_in_one_folder_are_to_be_named(tmp_path: Path) -> None:
    val = tmp_path / "ILSVRC2012_img_val.tar"
    val.write_bytes(tar_of({"ILSVRC2012_val_00000001.JPEG": b"1"}))
    with pytest.raises(DataError, match=r"contains ILSVRC2012_val_00000001.JPEG. Unpack it and pass the"):
        open_input(str(val)).list()
    train = tmp_path / "ILSVRC2012_img_train.tar"
    train.write_bytes(tar_of({"n01.tar": tar_of({"n01_1.JPEG": b"1"})}))
    with pytest.raises(
        DataError, match=r"ILSVRC2012_img_train\.tar contains tars and lies next to other archives"
    ):
        open_input(str(tmp_path))
    assert open_input(str(train)).kind == "imagenet_tar"


def test_the_first_tars_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "train-0000.tar").write_bytes(tar_of({}))
    (tmp_path / "train-0001.tar").write_bytes(tar_of({"a.jpg": b"", "b.jpg": b"", "b.cls": b"0"}))
    assert open_input(str(tmp_path)).kind == "webdataset"


def test_nothing_there_is_an_error_that_says_what_is_expected(s3: str, tmp_path: Path) -> None:
    expected = "one folder of images per class; .*ILSVRC2012_img_train.tar.*; WebDataset tars; Parquet files"
    open_storage(s3).write("README.md", b"words")
    (tmp_path / "here").mkdir()
    (tmp_path / "images.zip").touch()
    for source in (
        str(tmp_path / "here"),
        str(tmp_path / "nothing"),
        str(tmp_path / "nothing.tar"),
        str(tmp_path / "images.zip"),
        str(tmp_path / "here/*.parquet"),
        str(tmp_path / "nothing/*.parquet"),
        s3,
        f"{s3}/nothing",
        f"{s3}/nothing.tar",
        f"{s3}/train-*.parquet",
    ):
        with pytest.raises(DataError, match=expected):
            open_input(source).list()
