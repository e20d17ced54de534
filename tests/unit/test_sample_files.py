"""Files of samples: the npz stream, the grid, and memory while they are written."""

import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_scale.errors import DataError
from dit_scale.sampling.assembly import assemble
from dit_scale.sampling.image_files import write_grid
from dit_scale.sampling.npz_files import check_npz, read_images, read_labels, write_npz
from dit_scale.sampling.sample_folder import claim

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
LABELS = np.arange(7)


@pytest.mark.parametrize(
    ("num", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (16, 4, 4), (17, 10, 2), (250, 10, 10)]
)
def test_grids(tmp_path: Path, num: int, columns: int, rows: int) -> None:
    shades = np.arange(num, dtype=np.uint8)[:, None, None, None]
    write_grid(np.broadcast_to(shades, (num, 4, 6, 3)), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as file:
        grid = np.asarray(file)
    assert grid.shape == (rows * 6 + 2, columns * 8 + 2, 3)
    shown = grid[3::6, 3::8, 0].ravel()[: min(num, 100)]
    assert shown.tolist() == list(range(min(num, 100)))


@pytest.mark.parametrize("cuts", [[7], [3, 7], [1, 2, 3, 4, 5, 6, 7]])
def test_parts_of_an_npz_change_no_byte(tmp_path: Path, cuts: list[int]) -> None:
    write_npz([IMAGES], LABELS, tmp_path / "whole.npz")
    write_npz(np.split(IMAGES, cuts[:-1]), LABELS, tmp_path / "samples.npz")
    assert (tmp_path / "samples.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_npz_has_the_format_of_the_evaluation_suite(tmp_path: Path) -> None:
    write_npz([IMAGES], LABELS, tmp_path / "new" / "samples.npz")
    with np.load(tmp_path / "new" / "samples.npz", allow_pickle=False) as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        assert np.array_equal(file["arr_0"], IMAGES)
        assert file["arr_1"].tolist() == LABELS.tolist()
        assert file["arr_1"].dtype == np.int64
    with zipfile.ZipFile(tmp_path / "new" / "samples.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("num_per_part", [1, 3, 7, 100])
def test_images_are_read_in_parts(tmp_path: Path, num_per_part: int) -> None:
    write_npz([IMAGES], LABELS, tmp_path / "samples.npz")
    parts = list(read_images(tmp_path / "samples.npz", num_per_part))
    assert max(len(part) for part in parts) <= num_per_part
    assert np.array_equal(np.concatenate(parts), IMAGES)
    assert read_labels(tmp_path / "samples.npz").tolist() == LABELS.tolist()


def test_any_flipped_bit_of_an_array_is_found(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    write_npz([IMAGES], LABELS, path)
    data = path.read_bytes()
    starts = [data.index(IMAGES.tobytes()), data.index(LABELS.tobytes())]
    for place in [starts[0], starts[0] + 200, starts[0] + IMAGES.nbytes - 1, starts[1] + 20]:
        broken = bytearray(data)
        broken[place] ^= 4
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"samples\.npz is damaged"):
            check_npz(path)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"arr_1": LABELS}, "arr_0"),
        ({"arr_0": IMAGES.astype(np.float32)}, "expected uint8"),
        ({"arr_0": IMAGES[0]}, "expected uint8"),
        ({"arr_0": np.array([{}], dtype=object)}, "expected uint8"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "samples.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=said):
        list(read_images(tmp_path / "samples.npz", 1))


def noise(num_images: int, size: int) -> Iterator[np.ndarray]:
    for number in range(num_images):
        yield np.full((1, size, size, 3), number % 256, dtype=np.uint8)


@pytest.mark.parametrize("per_part", [1, 60])
def test_assembly_holds_a_few_images_in_memory(tmp_path: Path, per_part: int) -> None:
    """60 images of 256 pixels are 11.8 MB; a tile of 2 is 0.4 MB, and the grid of all 60 is 11.9 MB."""
    num, size = 60, 256
    folder = claim(tmp_path, {"images": num, "sampling": {"tile": 2}})
    labels = np.zeros(num, dtype=np.int64)
    for first in range(0, num, per_part):
        folder.commit(first, np.concatenate(list(noise(per_part, size))), labels[:per_part])
    tracemalloc.start()
    write_npz(folder.images(labels), labels, tmp_path / "again.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    assert assemble(folder, labels)
    assert not (tmp_path / "parts").exists()
