"""Layouts that only look like classes, unreadable folders, and notes on a listing."""

import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from rich.console import Console

from dit_scale.errors import DataError, StorageError
from dit_scale_pipeline.inputs import Listing, open_input
from dit_scale_pipeline.inputs.layout import are_shards, layout_notes
from dit_scale_pipeline.inputs.names import few, is_hidden, printable, to_utf8
from dit_scale_pipeline.progress import report_listing
from tests.support.archives import Images, class_folders, class_tars, tar_of
from tests.support.s3 import BUCKET

NOBODY = 65534
CLASSES: Images = {name: {"0.jpg": b"."} for name in ("n01", "n02", "n03")}


def put(folder: Path, *paths: str) -> str:
    """Write files at these paths below a folder and return its name."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b".")
    return str(folder)


# Splits, nested folders, tars of folders


@pytest.mark.parametrize(
    "paths",
    [
        ("train/n01/0.jpg", "train/n02/0.jpg", "val/n01/1.jpg", "val/n02/1.jpg"),
        ("train/n01/0.jpg", "train/n02/0.jpg"),
        ("train/n01/images/0.jpg", "train/n02/images/0.jpg", "val/images/1.jpg", "test/images/2.jpg"),
        ("train/n01/0.jpg", "train/n02/0.jpg", "test/0.jpg", "lists/a.csv"),
        ("Training/n01/0.jpg", "Training/n02/0.jpg", "validation_set/0.jpg", "Lists/a.csv"),
        ("train2017/0.jpg", "val2017/1.jpg"),
    ],
)
def test_a_folder_of_splits_is_refused(paths: tuple[str, ...], tmp_path: Path) -> None:
    source = put(tmp_path, *paths)
    with pytest.raises(DataError, match=r"expected one folder per class, got .* the splits") as caught:
        open_input(source).list()
    first = paths[0].partition("/")[0]
    assert f"Pass one split: source={source}/{first}. If they are classes, give them other names" in str(
        caught.value
    )


def test_what_a_split_holds_is_said_and_links_of_other_names_are_classes(tmp_path: Path) -> None:
    source = put(tmp_path / "x", "train/n01/0.jpg", "train/n02/0.jpg", "val/n01/1.jpg", "val/n02/1.jpg")
    with pytest.raises(
        DataError, match=r"train, val: train contains 2 folders \(n01, n02\); val contains 2 folders"
    ):
        open_input(source).list()
    (tmp_path / "y").mkdir()
    for name in ("train", "val"):
        (tmp_path / "y" / f"the {name}").symlink_to(tmp_path / "x" / name)
    listing = open_input(str(tmp_path / "y")).list()
    assert listing.class_names == ("the train", "the val")
    assert len(listing) == 4


@pytest.mark.parametrize(
    "paths",
    [
        ("bus/0.jpg", "car/0.jpg", "train/0.jpg"),
        ("bus/a/0.jpg", "bus/b/0.jpg", "train/a/0.jpg", "train/b/0.jpg"),
        ("n01/images/0.jpg", "n02/images/0.jpg"),
        ("train/0.jpg", "train/1.jpg"),
    ],
)
def test_folders_that_may_be_classes_are_classes(paths: tuple[str, ...], tmp_path: Path) -> None:
    listing = open_input(put(tmp_path, *paths)).list()
    assert listing.class_names == tuple(sorted({path.partition("/")[0] for path in paths}))
    assert list(listing.paths) == list(paths)


def test_classes_that_hold_only_folders_are_pointed_out(tmp_path: Path) -> None:
    listing = open_input(put(tmp_path / "a", "imagenet/n01/0.jpg", "imagenet/n02/0.jpg")).list()
    (said,) = layout_notes(listing)
    assert "no image lies directly in a class, each class contains folders (imagenet: n01, n02)" in said
    assert "source=.../imagenet" in said
    assert layout_notes(open_input(put(tmp_path / "b", "n01/images/0.jpg", "n02/images/0.jpg")).list()) == []


@pytest.mark.parametrize("inner", ["train/{}", "{}", "./a/b/{}"])
def test_a_tar_of_class_folders_is_refused(inner: str, tmp_path: Path) -> None:
    members = {inner.format(f"{name}/{number}.jpg"): b"." for name in CLASSES for number in range(9)}
    (tmp_path / "pictures.tar").write_bytes(tar_of(members))
    with pytest.raises(
        DataError, match=r"pictures.tar: pictures contains 3 folders \(n01, n02, n03\)\. Unpack them"
    ):
        open_input(str(tmp_path)).list()
    with pytest.raises(
        DataError, match=r"pictures.tar contains .*n01/0.jpg, .* and 11 more. Unpack it and pass"
    ):
        open_input(str(tmp_path / "pictures.tar"))


def test_tars_of_splits_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.tar").write_bytes(tar_of({"0.jpg": b"."}))
    with pytest.raises(DataError, match=r"expected one tar per class.* got train.tar, val.tar"):
        open_input(str(tmp_path)).list()


def test_class_tars_may_hold_folders(tmp_path: Path) -> None:
    for name in ("n01", "n02"):
        (tmp_path / f"{name}.tar").write_bytes(tar_of({f"{name}/0.jpg": b".", f"{name}/sub/1.jpg": b"."}))
    assert open_input(str(tmp_path)).list().paths[:2] == ["n01/n01/0.jpg", "n01/n01/sub/1.jpg"]


# Shards without labels


@pytest.mark.parametrize(
    ("names", "members"),
    [
        (("00000.tar", "00001.tar"), ("000000000.jpg", "000000000.txt")),
        (("shard-00000.tar", "shard-00001.tar"), ("000000000.jpg", "000000001.jpg")),
        (("00007.tar", "00008.tar"), ("000070000.jpg",)),
        (("00000.tar",), ("0.jpg",)),
        (("cats.tar", "dogs.tar"), ("0.jpg", "0.txt")),
    ],
)
def test_shards_without_labels_are_no_classes(
    names: tuple[str, ...], members: tuple[str, ...], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(tar_of(dict.fromkeys(members, b".")))
    with pytest.raises(DataError, match=r"look like WebDataset shards without labels: .* contains") as caught:
        open_input(str(tmp_path))
    assert "A sample needs .cls with a decimal number, or .json" in str(caught.value)


def test_names_of_shards() -> None:
    assert are_shards(["00000.tar"])
    assert are_shards(["train-000000-of-000002.tar", "train-000001-of-000002.tar"])
    assert not are_shards(["00000.tar", "00002.tar"])
    assert not are_shards(["n01.tar", "n02.tar"])
    assert not are_shards(["n01440764.tar", "n01440765.tar"])
    assert not are_shards(["00000.tar", "other.tar"])


def test_what_img2dataset_leaves_is_taken_for_its_tars(tmp_path: Path) -> None:
    for number in range(2):
        members = {
            f"{number}.jpg": b".",
            f"{number}.txt": b"a cat",
            f"{number}.json": b'{"caption": "a cat"}',
        }
        (tmp_path / f"0000{number}.tar").write_bytes(tar_of(members))
        put(tmp_path, f"0000{number}.parquet", f"0000{number}_stats.json")
    images = open_input(str(tmp_path))
    with pytest.raises(DataError, match=r"got only 0.jpg, 0.txt, 0.json. .*as written by img2dataset"):
        images.list()


# What lies there instead


def test_images_in_no_folder_and_compressed_archives_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Got 2 images in no folder \(0.jpg, 1.JPEG\): move them"):
        open_input(put(tmp_path / "flat", "0.jpg", "1.JPEG")).list()
    with pytest.raises(DataError, match=r"Got train.tar.gz, but compressed .*: unpack it"):
        open_input(put(tmp_path / "gz", "train.tar.gz")).list()
    with pytest.raises(DataError, match=r"Got train.zip, but compressed .*: unpack it"):
        open_input(put(tmp_path / "zip", "train.zip") + "/train.zip")


def test_archives_in_the_folders_are_to_be_named(tmp_path: Path) -> None:
    source = put(tmp_path, "data/train-00000-of-00001.parquet", "README.md", ".git/config")
    with pytest.raises(DataError, match=r"got archives .*Pass them as source=.*/data/train-\*-of-\*.parquet"):
        open_input(source).list()
    put(tmp_path, "data/0.jpg")
    assert len(open_input(source).list()) == 2, "a lost archive among images is one bad input"


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"\x1f\x8b\x08", "is compressed with gzip"),
        (b"PK\x03\x04", "is a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer: .*git lfs pull"),
        (b"<!doctype html>", "is a web page"),
    ],
)
@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_a_file_that_is_something_else_is_named(head: bytes, what: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"train-0{suffix}").write_bytes(head + bytes(2000))
    with pytest.raises(DataError, match=what) as caught:
        open_input(str(tmp_path)).list()
    assert "damaged" not in str(caught.value)
    assert "copy it again" not in str(caught.value)


# Names


def test_names_that_are_not_text(tmp_path: Path) -> None:
    source = Path(class_folders(tmp_path / "x", CLASSES))
    Path(os.fsdecode(os.fsencode(source) + b"/n01/caf\xe9.jpg")).write_bytes(b".")
    assert "n01/caf\udce9.jpg" in open_input(str(source)).list().paths
    Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9")).mkdir()
    with pytest.raises(DataError, match=r"class names in UTF-8, got caf\\xe9. Rename them"):
        open_input(str(source)).list()


def test_names_are_shown_on_one_line() -> None:
    assert printable("a\nb\x1b[0m \u00e9 caf\udce9 \ud800") == "a\\nb\\x1b[0m \u00e9 caf\\xe9 \\ud800"
    assert (to_utf8("a\nb"), to_utf8("\udce9")) == ("a\nb", "\\xe9")
    assert few(f"{number}\n" for number in range(7)) == "0\\n, 1\\n, 2\\n, 3\\n, 4\\n and 2 more"


def test_hidden_names() -> None:
    for name in (".DS_Store", "._a.tar", "__MACOSX", "__MACOSX.tar", "@eaDir", "$Recycle.Bin", "Thumbs.db"):
        assert is_hidden(name)
    for name in ("n01", "_a.jpg", "MACOSX", "a.DS_Store", "lost"):
        assert not is_hidden(name)


# A listing is complete or refused


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run as a user who is subject to permissions."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def readable() -> Iterator[Path]:
    """Class folders that every user may read, unlike pytest's own folders."""
    folder = Path(tempfile.mkdtemp())
    class_folders(folder / "x", CLASSES)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    yield folder / "x"
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("folder", ["n02", "n02/deep", "n02/deep/er"])
def test_a_folder_that_may_not_be_read_stops_the_listing(folder: str, readable: Path) -> None:
    put(readable, "n02/deep/er/1.jpg")
    with as_nobody():
        assert len(open_input(str(readable)).list()) == 4
    (readable / folder).chmod(0)
    with as_nobody():
        with pytest.raises(StorageError, match=rf"cannot list {readable}/{folder}: Permission denied"):
            open_input(str(readable)).list()


def test_a_source_that_may_not_be_seen_is_an_error_and_no_traceback(readable: Path) -> None:
    readable.chmod(0)
    for source in (readable, readable / "n01", readable / "a.tar"):
        with as_nobody():
            with pytest.raises(StorageError, match=f"cannot list {source}: Permission denied"):
                open_input(str(source)).list()


def test_lost_and_found_is_not_looked_into(readable: Path) -> None:
    (readable / "lost+found").mkdir(mode=0)
    with as_nobody():
        listing = open_input(str(readable)).list()
    assert (listing.class_names, listing.ignored) == (("n01", "n02", "n03"), ("lost+found/",))


def test_a_folder_that_goes_meanwhile_stops_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = class_folders(tmp_path / "x", CLASSES)
    images = open_input(source)
    scandir = os.scandir

    def removing(folder: Any) -> Any:
        if folder == Path(source, "n03"):
            shutil.rmtree(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", removing)
    with pytest.raises(StorageError, match=r"cannot list .*/n03: No such file or directory"):
        images.list()


def test_links_that_lead_round_in_a_circle_are_named(tmp_path: Path) -> None:
    source = Path(class_folders(tmp_path / "x", CLASSES))
    (source / "n04").symlink_to(source / "n01")
    assert len(open_input(str(source)).list()) == 4, "a link to another class leads nowhere twice"
    (source / "n04").unlink()
    (source / "n01/again").symlink_to(source)
    with pytest.raises(DataError, match=r"n01/again links to .*/x, which contains the link.*Remove the link"):
        open_input(str(source)).list()
    (source / "n01/again").unlink()
    (source / "n01/itself").symlink_to(source / "n01/itself")
    with pytest.raises(StorageError, match=r"cannot list .*n01/itself: Too many levels of symbolic links"):
        open_input(str(source)).list()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    source = Path(class_folders(tmp_path / "x", CLASSES))
    (source / "n01/nowhere.jpg").symlink_to("/nowhere")
    (source / ".#lock").symlink_to("me@here")
    assert len(open_input(str(source)).list()) == 4, "a bad input, which is listed"
    os.mkfifo(source / "n01/pipe")
    with pytest.raises(DataError, match="n01/pipe is a pipe, a socket or a device"):
        open_input(str(source)).list()


# Keys of S3


@pytest.fixture
def prefix(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """A prefix, and a function that writes an object with any key below it."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    name = secrets.token_hex(8)
    yield f"s3://{BUCKET}/{name}", lambda key: client.put_object(Bucket=BUCKET, Key=name + key, Body=b".")
    client.close()


def test_markers_of_folders_are_no_classes(prefix: tuple[str, Any]) -> None:
    url, put_object = prefix
    for key in ("/", "/n01/", "/n01/%41+ \u00e9.jpg", "/n02/0.jpg", "/n03/", "/n03/sub/", "/.git/"):
        put_object(key)
    listing = open_input(url).list()
    assert listing.paths == ["n01/%41+ \u00e9.jpg", "n02/0.jpg"]
    assert listing.class_names == ("n01", "n02")
    assert listing.ignored == (".git/", "n03/")


@pytest.mark.parametrize("key", ["/n01//0.jpg", "//0.jpg", "/n01/../0.jpg"])
def test_keys_that_are_no_paths_are_named(key: str, prefix: tuple[str, Any]) -> None:
    url, put_object = prefix
    put_object("/n01/0.jpg")
    put_object(key)
    with pytest.raises(DataError, match=r"expected a key without empty components") as caught:
        open_input(url).list()
    assert f"{url}{key}: " in str(caught.value)


# What is said of a listing


def said(listing: Listing) -> list[str]:
    text = io.StringIO()
    report_listing(listing, Console(file=text, width=1000, markup=False))
    return text.getvalue().splitlines()


def test_classes_and_their_numbers_of_images_are_said(tmp_path: Path) -> None:
    images = {f"n{n:02d}": {f"{m}.jpg": b"." for m in range(1 + n * (n < 9))} for n in range(10)}
    listing = open_input(class_tars(tmp_path / "x", images)).list()
    assert said(listing) == [
        "46 images of 10 classes in 10 archives: class_tars",
        "classes, with numbers of images: n00 (1), n01 (2), n02 (3), ... n07 (8), n08 (9), n09 (1); smallest "
        "n00 (1), largest n08 (9)",
    ]
    few_classes = open_input(class_folders(tmp_path / "y", {**CLASSES, ".git[b]": {}})).list()
    assert said(few_classes) == [
        "3 images of 3 classes: class_folders",
        "classes, with numbers of images: n01 (1), n02 (1), n03 (1)",
        "ignored, not images of a class: 1 (.git[b]/)",
    ]


def test_numbers_as_names_are_said(tmp_path: Path) -> None:
    names = [str(number) for number in range(12)]
    listing = open_input(class_folders(tmp_path / "x", {name: {"0.jpg": b"."} for name in names})).list()
    (note,) = layout_notes(listing)
    assert "label 2 is class 10, not 2" in note
    padded = {f"{number:02d}": {"0.jpg": b"."} for number in range(12)}
    assert layout_notes(open_input(class_folders(tmp_path / "y", padded)).list()) == []


def test_labels_that_count_from_one_are_said(tmp_path: Path) -> None:
    members = {f"{n}.{kind}": data for n in (1, 2) for kind, data in (("jpg", b"."), ("cls", b"%d" % n))}
    (tmp_path / "train-0.tar").write_bytes(tar_of(members))
    listing = open_input(str(tmp_path)).list()
    assert listing.empty_classes == ("0",)
    (note,) = layout_notes(listing)
    assert "labels run from 1 to 2 and class 0 has no image" in note
    sparse = Listing("webdataset", ("0", "1", "2"), ["a"], np.array([2], np.int32), labels_in_paths=False)
    assert layout_notes(sparse) == []
