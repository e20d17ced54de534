"""Parquet files: row groups shared by threads, invalid rows and files, damage."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dit_scale.errors import DataError
from dit_scale.storage import DiskStorage, open_storage
from dit_scale_pipeline.inputs import Entry, InputError, Listing, open_input
from dit_scale_pipeline.inputs.parquet import Parquet
from dit_scale_pipeline.inputs.saved import current_listing, describe_changes, load_listing, save_listing
from tests.support.archives import parquet, watch_reads, write_parquet


def test_threads_may_share_parquet_files(tmp_path: Path) -> None:
    source = parquet(tmp_path / "p", {"a": {f"{n}.png": bytes([n]) * 1000 for n in range(200)}}, 7)
    images = open_input(source)
    listing = images.list()
    draws = np.random.default_rng(0).integers(0, 200, 400).tolist()
    entries = listing.entries()
    alone = [open_input(source).read(entry) for entry in entries]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: images.read(entries[row]), draws))
    assert found == [alone[row] for row in draws]
    assert len(set(alone)) == 200


def test_threads_at_a_border_fetch_each_row_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet(tmp_path / "p", {"a": {f"{n:02d}.png": os.urandom(9000) for n in range(32)}}, 8)
    images = open_input(source)
    first = images.list().entries()[:16]
    reads = watch_reads(monkeypatch)
    read_range = DiskStorage.read_range

    def slow(self: DiskStorage, key: str, start: int, length: int) -> bytes:
        time.sleep(0.02)  # all threads come while the first one fetches
        return read_range(self, key, start, length)

    monkeypatch.setattr(DiskStorage, "read_range", slow)
    alternating = [entry for pair in zip(first[:8], first[8:], strict=True) for entry in pair]
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(images.read, alternating))) == 16
    assert len(reads.ranges) <= 1 + 2 * 2, "the footer, and two columns of two row groups"


def test_parquet_rows_without_an_image_are_bad_inputs(tmp_path: Path) -> None:
    rows = [({"bytes": b"x", "path": ""}, 2), ({"bytes": None, "path": "a.jpg"}, 0), (None, 0)]
    write_parquet(tmp_path / "a.parquet", rows, [])
    images = open_input(str(tmp_path / "a.parquet"))
    listing = images.list()
    assert listing.class_names == ("0", "1", "2")
    first, *others = listing.entries()
    assert images.read(first) == b"x"
    for entry in others:
        with pytest.raises(InputError, match="the row has no image"):
            images.read(entry)


@pytest.mark.parametrize(
    ("label", "why"),
    [
        (-1, "label -1; expected a class number"),
        (None, "rows without a label"),
        (2, "the schema names 2 classes"),
    ],
)
def test_parquet_labels_that_are_none_are_refused(label: int | None, why: str, tmp_path: Path) -> None:
    row = {"bytes": b"x", "path": ""}
    write_parquet(tmp_path / "a.parquet", [(row, 0), (row, label)], ["cat", "dog"])
    with pytest.raises(DataError, match=f"a.parquet.*{why}"):
        open_input(str(tmp_path)).list()


def test_parquet_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    row = [{"bytes": b"x", "path": None}]
    columns: dict[str, list[object]] = {"img": row, "fine_label": [1], "coarse_label": [0]}
    for table, why in (
        ({"img": [b"x"], "label": [1]}, r"expected columns image .* got img \(binary\), label \(int64\)"),
        (columns, r"Set image_column=img label_column=... \(one of fine_label, coarse_label\)"),
        (
            {"image": row, "label": ["cat"]},
            r"label \(string\). Column label is not numeric: write each class",
        ),
    ):
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=why):
            open_input(str(tmp_path)).list()


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        name: [{"bytes": name.encode() * n, "path": None} for n in range(1, 4)] for name in ("img", "image")
    }
    labels = {"fine_label": [2, 1, 0], "coarse_label": [0, 0, 1], "other": [2, 1, 0]}
    features = {"info": {"features": {"fine_label": {"names": ["x", "y", "z"]}}}}
    table = pyarrow.table({**columns, **labels}).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")

    def listed(image: str, label: str) -> Listing:
        return open_input(str(tmp_path), columns=(image, label)).list()

    fine = listed("img", "fine_label")
    assert (fine.labels.tolist(), fine.class_names) == ([2, 1, 0], ("x", "y", "z"))
    assert listed("img", "coarse_label").labels.tolist() == [0, 0, 1]
    images = open_input(str(tmp_path), fine.kind, fine.columns)
    assert [images.read(entry) for entry in fine.entries()] == [b"img", b"imgimg", b"imgimgimg"]
    # What is encoded follows from the digest: other images, or other labels.
    digests = {listed(image, label).sha256 for image in ("img", "image") for label in labels}
    assert len(digests) == 4
    storage = open_storage(tmp_path.with_name("out"))
    save_listing(storage, fine)
    saved = load_listing(storage)
    assert saved is not None
    assert (saved.columns, saved.sha256) == (fine.columns, fine.sha256)
    assert current_listing(images, saved) is saved
    other = current_listing(open_input(str(tmp_path), columns=("image", "fine_label")), saved)
    assert describe_changes(saved, other) == "columns image and fine_label instead of img and fine_label"


def test_paths_alone_are_no_images(tmp_path: Path) -> None:
    row = {"bytes": None, "path": "a.jpg"}
    write_parquet(tmp_path / "a.parquet", [(row, 0), (row, 1), (None, 1)], [])
    with pytest.raises(
        DataError, match=r"a.parquet: image.bytes is empty in all 3 rows: the file contains only the paths"
    ):
        open_input(str(tmp_path)).list()


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    source = parquet(tmp_path / "p", {"a": {f"{n}.png": os.urandom(3000) for n in range(8)}})
    images = open_input(source)
    entry = images.list().entries()[0]
    path = Path(source, entry.archive)
    whole = path.read_bytes()
    for data in (whole[:-100], whole[: len(whole) // 2], b"", b"PAR1" + b"?" * 100 + b"PAR1"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"train-00000.*cannot be read as Parquet"):
            open_input(source, "parquet").list()
    path.write_bytes(whole[:2000] + b"????" + whole[2004:])
    with pytest.raises(DataError, match=r"train-00000.*cannot be read as Parquet .*CRC"):
        open_input(source, "parquet").read(entry)


def test_a_parquet_file_that_changed_since_is_no_image(tmp_path: Path) -> None:
    source = parquet(tmp_path / "p", {"a": {f"{n}.png": b"x" for n in range(8)}})
    listing = open_input(source).list()
    entry = listing.entries()[3]
    row = {"bytes": b"x", "path": ""}
    for rows, now in (([(row, 0)] * 3, "None"), ([(row, 1)] * 4, "1")):
        write_parquet(Path(source, entry.archive), rows, [])
        with pytest.raises(DataError, match=f"changed since .*: the label of row 3 was 0 and is {now} now"):
            open_input(source, "parquet").read(entry)
    Path(source, entry.archive).unlink()
    with pytest.raises(DataError, match="in the listing but does not exist here"):
        open_input(source, "parquet").read(entry)


def test_reading_an_entry_needs_no_listing(tmp_path: Path) -> None:
    source = parquet(tmp_path / "p", {"n01": {"a.JPEG": b"three", "b.JPEG": b"four"}})
    entry = open_input(source).list().entries()[0]
    assert isinstance(open_input(source, "parquet"), Parquet)
    assert open_input(source, "parquet").read(Entry(0, "", 0, entry.archive, 0)) == b"three"
