"""Features on disk, computed once per set of images and network.

    <root>/<key>/chunks/00000256.npz   rows of 256 images, written atomically by any process
    <root>/<key>/pool.npy ...          all rows, written when no chunk is missing
    <root>/<key>/features.json         sealed, written last: digests of the files above

The key is the SHA-256 of the images' digest and of the network's identity. So a killed evaluation continues
with the chunks that it committed, and a second one computes no features.

Shapes: N images, F pooled features, S spatial features, C classes.
"""

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_scale.errors import DataError
from dit_scale.evaluate.features import NetworkIdentity
from dit_scale.evaluate.images.base import TILE, file_sha256
from dit_scale.sealed import sealed, unseal
from dit_scale.storage.outputs import new_file

CHUNK = 4 * TILE
"""Images per committed file."""
MARK = "features.json"
KINDS = ("pool", "spatial", "probabilities")

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FeatureRows:
    """Features of all images of a set, fp32; memory maps, so reading a part loads only this part."""

    pool_NF: F32
    spatial_NS: F32 | None
    probabilities_NC: F32 | None


class FeatureCache:
    """The rows of one set of images under one network."""

    def __init__(self, root: Path, images_sha256: str, count: int, identity: NetworkIdentity) -> None:
        self._subject: dict[str, Any] = {
            "images_sha256": images_sha256,
            "images": count,
            "network": asdict(identity),
        }
        key = hashlib.sha256(json.dumps(self._subject, sort_keys=True).encode()).hexdigest()
        self.folder = root / key[:32]
        self._count = count

    def is_complete(self, say: Callable[[str], object] = lambda note: None) -> bool:
        """Whether all rows are there and intact. Reports damaged files to `say` and removes their mark."""
        mark = self.folder / MARK
        if not mark.is_file():
            return False
        try:
            record = unseal(mark.read_bytes(), str(mark), DataError)
            for name, sha256 in record["files"].items():
                path = self.folder / name
                if not path.is_file() or file_sha256(path) != sha256:
                    raise DataError(f"{path} is missing or damaged")
        except DataError as error:
            say(f"{error}; its features are computed again")
            mark.unlink()
            return False
        return True

    def missing(self) -> list[range]:
        """Return the images of the chunks that no process has committed."""
        chunks = (range(at, min(at + CHUNK, self._count)) for at in range(0, self._count, CHUNK))
        return [chunk for chunk in chunks if not self._chunk(chunk).is_file()]

    def write_chunk(self, images: range, rows: dict[str, F32]) -> None:
        """Commit the rows of a chunk, by kind."""
        with new_file(self._chunk(images)) as temporary, temporary.open("wb") as file:
            np.savez(file, **rows)  # type: ignore[arg-type]  # numpy's stub takes the keywords for options

    def assemble(self) -> None:
        """Make one file per kind from all chunks, then commit, then remove the chunks.

        Raises DataError, and removes the chunk, if one is damaged.
        """
        digests = {}
        for kind in sorted(self._read_chunk(range(min(CHUNK, self._count)))):
            digests[f"{kind}.npy"] = self._assemble(kind)
        with new_file(self.folder / MARK) as temporary:
            record = {"format": "dit-scale features", "version": 1, **self._subject, "files": digests}
            temporary.write_bytes(sealed(record, indent=1))
        shutil.rmtree(self.folder / "chunks")

    def _assemble(self, kind: str) -> str:
        """Write the file of a kind and return its SHA-256, verified by reading the file back."""
        hasher = hashlib.sha256()
        path = self.folder / f"{kind}.npy"
        with new_file(path) as temporary:
            with temporary.open("wb") as file:
                for at in range(0, self._count, CHUNK):
                    rows = self._read_chunk(range(at, min(at + CHUNK, self._count)))[kind]
                    if at == 0:
                        np.lib.format.write_array_header_1_0(file, _header(self._count, rows.shape[1]))
                    data = np.ascontiguousarray(rows, "<f4").tobytes()
                    hasher.update(data)
                    file.write(data)
            header_bytes = temporary.stat().st_size - self._count * rows.shape[1] * 4
            with temporary.open("rb") as file:
                file.seek(header_bytes)
                if hashlib.file_digest(file, "sha256").hexdigest() != hasher.hexdigest():
                    raise DataError(f"{temporary} differs from what was written; check the disk")
        return file_sha256(path)

    def open(self) -> FeatureRows:
        """Map the rows of a complete cache into memory."""
        maps = {
            kind: np.load(self.folder / f"{kind}.npy", mmap_mode="r", allow_pickle=False)
            for kind in KINDS
            if (self.folder / f"{kind}.npy").is_file()
        }
        return FeatureRows(maps["pool"], maps.get("spatial"), maps.get("probabilities"))

    def _chunk(self, images: range) -> Path:
        return self.folder / "chunks" / f"{images.start:08d}.npz"

    def _read_chunk(self, images: range) -> dict[str, F32]:
        path = self._chunk(images)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                rows = {kind: arrays[kind] for kind in arrays.files}
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
            path.unlink()
            raise DataError(
                f"{path} was damaged ({error}) and is removed; run the same command again"
            ) from None
        if any(len(array) != len(images) for array in rows.values()):
            path.unlink()
            raise DataError(f"{path} had rows of other images and is removed; run the same command again")
        return rows


def _header(count: int, width: int) -> dict[str, Any]:
    return {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
