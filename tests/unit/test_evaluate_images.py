"""Sets of images to evaluate: the same pixels from every kind of source, and what each refuses."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_scale.data.pixels import center_crop, to_array
from dit_scale.data.shards import LatentDataset
from dit_scale.errors import DataError
from dit_scale.evaluate.images import TILE, ImageSet, open_images
from dit_scale.evaluate.images.npz import NpzImages
from dit_scale.vae_files import find_vae
from tests.support.latents import edit_info, write_latents
from tests.support.scored_images import random_images, write_folder, write_npz, write_tar

CPU = torch.device("cpu")
NUM = TILE + 9
IMAGES = random_images(NUM)


def opened(source: Path | str, crop: int | None = None) -> ImageSet:
    return open_images(str(source), device=CPU, crop=crop)


@pytest.fixture(scope="module", params=["stored", "compressed", "folder", "tar", "samples"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    if request.param == "folder":
        return write_folder(IMAGES, folder)
    if request.param == "tar":
        return write_tar(IMAGES, folder / "images.tar")
    if request.param == "samples":
        write_npz(IMAGES, folder / "samples.npz")
        Image.fromarray(IMAGES[0]).save(folder / "grid.png")
        return folder
    return write_npz(IMAGES, folder / "images.npz", compressed=request.param == "compressed")


def test_every_kind_has_the_same_pixels_in_any_order_of_reads(source: Path) -> None:
    images = opened(source)
    assert (images.count, images.image_size) == (NUM, 16)
    for part in (range(TILE, NUM), range(TILE), range(5, 8), range(NUM)):
        assert np.array_equal(images.read(part), IMAGES[part.start : part.stop])
    assert images.read(range(1)).dtype == np.uint8


def test_a_digest_names_the_content(source: Path, tmp_path: Path) -> None:
    assert opened(source).digest() == opened(source).digest()
    other = IMAGES.copy()
    other[NUM - 1, 0, 0, 0] ^= 1
    if source.suffix == ".tar":
        changed: Path = write_tar(other, tmp_path / "images.tar")
    elif source.suffix == ".npz":
        changed = write_npz(other, tmp_path / "images.npz")
    elif (source / "samples.npz").exists():
        changed = write_npz(other, tmp_path / "samples.npz").parent
    else:
        changed = write_folder(other, tmp_path)
    assert opened(changed).digest() != opened(source).digest()


def test_files_are_cropped_as_encoding_crops_them(tmp_path: Path) -> None:
    draws = np.random.Generator(np.random.Philox(key=1))
    sizes = [(40, 24), (16, 16), (100, 90)]
    originals = [Image.fromarray(draws.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    for number, image in enumerate(originals):
        image.save(tmp_path / f"{number}.png")
    images = opened(tmp_path, crop=16)
    assert images.image_size == 16
    assert "16 px" in images.preparation
    expected = [to_array(center_crop(image, 16)) for image in originals]
    assert np.array_equal(images.read(range(3)), np.stack(expected))
    assert images.digest() != opened(tmp_path, crop=8).digest()


def test_hidden_and_other_files_are_no_images(tmp_path: Path) -> None:
    write_folder(IMAGES[:2], tmp_path)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden.png").write_text("")
    (tmp_path / ".thumbs").mkdir()
    Image.fromarray(IMAGES[5]).save(tmp_path / ".thumbs" / "a.png")
    assert opened(tmp_path).count == 2


def test_latents_are_decoded_tile_by_tile(tmp_path: Path, tiny_vae: str) -> None:
    write_latents(tmp_path, num=TILE + 3)
    identity = find_vae(tiny_vae).identity
    edit_info(tmp_path, vae=identity.model_dump())
    images = open_images(str(tmp_path), device=CPU, vae=tiny_vae)
    assert (images.count, images.image_size) == (TILE + 3, 32)
    tail = images.read(range(TILE, TILE + 3))
    assert tail.shape == (3, 32, 32, 3)
    assert np.array_equal(tail[1:], images.read(range(TILE + 1, TILE + 3)))
    named = open_images(f"latents:{tmp_path}", device=CPU, vae=tiny_vae)
    assert named.digest() == images.digest()
    assert len(LatentDataset.open(tmp_path)) == images.count


# Refusals


def npz_of(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IMAGES.astype(np.float32), r"expected arr_0 uint8 \(N, H, W, 3\) with H = W, got float32"),
        (IMAGES.transpose(0, 3, 1, 2).copy(), r"got uint8 \(73, 3, 16, 16\)"),
        (IMAGES[0], r"got uint8 \(16, 16, 3\)"),
        (IMAGES[:, :8], r"got uint8 \(73, 8, 16, 3\)"),
        (IMAGES[:0], r"got uint8 \(0, 16, 16, 3\)"),
        (np.array([{"a": 1}], dtype=object), "holds pickled objects"),
    ],
)
def test_an_npz_of_another_shape_or_type(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(npz_of(tmp_path / "a.npz", arr_0=array))


def test_an_npz_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no arr_0; it has mu, sigma"):
        opened(npz_of(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2)))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_npz(tmp_path: Path, compressed: bool) -> None:
    path = write_npz(IMAGES, tmp_path / "a.npz", compressed)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match="truncated or no npz file"):
        opened(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_npz(tmp_path: Path, compressed: bool) -> None:
    path = write_npz(IMAGES, tmp_path / "a.npz", compressed)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    images = opened(path)
    with pytest.raises(DataError, match="is damaged"):
        images.read(range(NUM)) if compressed else images.digest()


def test_members_of_an_npz_are_found_behind_other_members(tmp_path: Path) -> None:
    path = npz_of(tmp_path / "a.npz", first=np.arange(1000), arr_0=IMAGES, last=np.arange(10))
    images = NpzImages(path)
    images.digest()
    assert np.array_equal(images.read(range(70, 73)), IMAGES[70:73])


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('the pickle ran')",))

    for name in ("a.pkl", "a.npz"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(DataError, match="is a pickle, which can run code when it is loaded"):
            opened(tmp_path / name)


@pytest.mark.parametrize("name", ["nothing", "a.zip"])
def test_other_sources(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"expected an npz file with arr_0, a folder or a tar of images"):
        opened(tmp_path / name)


def test_an_npy_file_in_the_place_of_an_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(DataError, match="is one npy array; expected an npz file"):
        opened(tmp_path / "a.npz")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no images"):
        opened(tmp_path)


def test_a_sample_folder_that_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "protocol.json").write_text("{}")
    with pytest.raises(DataError, match="its sampling has not finished"):
        opened(tmp_path)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    write_folder(IMAGES[:4], tmp_path)
    broken = tmp_path / "1" / "00002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    images = opened(tmp_path)
    with pytest.raises(DataError, match=r"1/00002\.png cannot be decoded.*repair or remove it"):
        images.read(range(4))


def test_mixed_sizes_are_named(tmp_path: Path) -> None:
    write_folder(IMAGES[:4], tmp_path)
    Image.new("RGB", (16, 20)).save(tmp_path / "1" / "00003.png")
    images = opened(tmp_path)
    with pytest.raises(
        DataError, match=r"mixed sizes: .* 16 x 16 pixels, 1/00003\.png has 16 x 20; pass --crop"
    ):
        images.read(range(4))
    assert opened(tmp_path, crop=16).read(range(4)).shape == (4, 16, 16, 3)


def test_a_first_image_that_is_not_square(tmp_path: Path) -> None:
    Image.new("RGB", (16, 20)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="expected square images"):
        opened(tmp_path)


def test_only_files_are_cropped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has images of 16 px, --crop asks for 8"):
        opened(write_npz(IMAGES, tmp_path / "a.npz"), crop=8)


def test_a_member_of_a_tar_never_leaves_its_folder(tmp_path: Path) -> None:
    path = write_tar(IMAGES[:1], tmp_path / "a.tar")
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("../../evil.png"), io.BytesIO(b""))
    with pytest.raises(DataError, match="would unpack outside of its folder"):
        opened(path)


def test_a_truncated_or_compressed_tar(tmp_path: Path) -> None:
    path = write_tar(IMAGES, tmp_path / "a.tar")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="truncated"):
        opened(path).read(range(NUM))
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO(b""))
    with pytest.raises(DataError, match="damaged, truncated, compressed or no tar"):
        opened(path)
