"""Class folders, and saved listings."""

import hashlib
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_scale.errors import DataError
from dit_scale.storage import open_storage
from dit_scale_pipeline.decoder import read_batch
from dit_scale_pipeline.inputs import Archive, Entry, Listing, open_input
from dit_scale_pipeline.inputs.saved import LISTING_KEY, describe_changes, load_listing, save_listing


def test_the_listing_is_sorted_bytewise_and_its_digest_is_the_shells(tmp_path: Path) -> None:
    paths = [
        "b/1.png",
        "b/10.png",
        "b/2.png",
        "a b/x.png",
        "a/x.png",
        "a/deep/y.png",
        "Z/q.jpg",
        "\u00e9/1.png",
    ]
    for path in (*paths, "outside.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "empty").mkdir()
    listing = open_input(str(tmp_path)).list()
    found = [entry.path for entry in listing.entries()]
    assert found == sorted(paths, key=os.fsencode)
    assert [entry.key for entry in listing.entries()] == list(range(len(paths)))
    assert listing.class_names == ("Z", "a", "a b", "b", "empty", "\u00e9")
    assert listing.empty_classes == ("empty",)
    assert listing.ignored == ("outside.txt",)
    for entry in listing.entries():
        assert listing.class_names[entry.label] == entry.path.split("/")[0]
    shell = "find . -mindepth 2 -type f -printf '%P\\0' | LC_ALL=C sort -z | sha256sum"
    ran = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert listing.sha256 == ran.stdout.split()[0]
    assert listing.sha256 == hashlib.sha256(b"".join(os.fsencode(path) + b"\0" for path in found)).hexdigest()


def test_a_source_without_class_folders_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder at"):
        open_input(str(tmp_path / "nothing")).list()
    (tmp_path / "x.png").touch()
    with pytest.raises(DataError, match="expected one folder of images per class"):
        open_input(str(tmp_path)).list()


def test_a_file_that_was_listed_and_is_not_there_is_no_bad_input(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c/a.png").touch()
    listing = open_input(str(tmp_path)).list()
    (tmp_path / "c/a.png").unlink()
    with pytest.raises(
        DataError, match=r"c/a.png is in the listing but does not exist .*visible on every node"
    ):
        read_batch(str(tmp_path), listing.kind, listing.entries(), 8)


FOLDERS = Listing("class_folders", ("a", "b"), ["a/1", "a/\udcff", "b/2"], np.array([0, 0, 1], np.int32))
ARCHIVES = replace(
    FOLDERS,
    kind="tars",
    archives=(Archive("x.tar", 100), Archive("y.tar", 200)),
    archive_numbers=np.array([0, 1, 1], np.int32),
    starts=np.array([512, 1024, 2**40]),
    sizes=np.array([1, 2, 3]),
    labels_in_paths=False,
    ignored=("z",),
)


@pytest.mark.parametrize("listing", [FOLDERS, ARCHIVES])
def test_a_saved_listing_comes_back(listing: Listing, tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert load_listing(storage) is None
    save_listing(storage, listing)
    found = load_listing(storage)
    assert found is not None
    assert found.entries() == listing.entries()
    for name in ("kind", "class_names", "archives", "ignored", "labels_in_paths", "sha256"):
        assert getattr(found, name) == getattr(listing, name)
    whole = (tmp_path / LISTING_KEY).read_bytes()
    save_listing(storage, listing)
    assert (tmp_path / LISTING_KEY).read_bytes() == whole, "the same bytes each time"


def test_a_damaged_saved_listing_is_named(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    save_listing(storage, ARCHIVES)
    whole = (tmp_path / LISTING_KEY).read_bytes()
    at = whole.index(b"b/2")
    for damaged in (b"", whole[:-1], whole[:at] + b"b/3" + whole[at + 3 :]):
        (tmp_path / LISTING_KEY).write_bytes(damaged)
        with pytest.raises(DataError, match=r"listing.safetensors is damaged .* delete it"):
            load_listing(storage)


def test_the_place_of_an_image_in_an_archive() -> None:
    assert ARCHIVES.entries(range(1, 2)) == (Entry(1, "a/\udcff", 0, archive="y.tar", start=1024, size=2),)


def test_what_became_of_a_source_is_said_in_words() -> None:
    assert describe_changes(FOLDERS, FOLDERS) == ""
    other = replace(FOLDERS, paths=["a/1", "a/3", "a/4"])
    assert describe_changes(FOLDERS, other) == "2 new (a/3, a/4) and 2 missing (a/\\xff, b/2)"
    relabelled = replace(ARCHIVES, labels=np.array([1, 0, 1], np.int32))
    assert describe_changes(ARCHIVES, relabelled) == "the same names with different labels"


def test_a_folder_above_the_classes_is_seen_by_what_it_holds(tmp_path: Path) -> None:
    for path in ("Data/train/n01/0.JPEG", "Annotations/train/n01/0.xml", "ImageSets/train.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b".")
    listing = open_input(str(tmp_path)).list()
    assert listing.empty_classes == ("Annotations", "ImageSets")
    assert listing.ignored == ("Annotations/train/n01/0.xml", "ImageSets/train.txt")
    with pytest.raises(DataError, match=r"Got no image in any folder and no archive, only n01/0\.xml"):
        open_input(str(tmp_path / "Annotations/train")).list()
