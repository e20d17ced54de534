"""The same images as class folders and in every kind of archive, for tests of inputs."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import webdataset

from dit_scale.storage import DiskStorage, S3Storage, open_storage

Images = Mapping[str, Mapping[str, bytes]]
"""Class => file name => contents."""


def tar_of(
    members: Mapping[str, bytes],
    format_: int = tarfile.GNU_FORMAT,
    pax_headers: Mapping[str, str] | None = None,
) -> bytes:
    """Return a tar of regular files; `pax_headers` are global headers of the PAX format."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format_, pax_headers=pax_headers) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def class_folders(folder: Path, images: Images) -> str:
    for name, files in images.items():
        (folder / name).mkdir(parents=True)
        for file, data in files.items():
            (folder / name / file).write_bytes(data)
    return str(folder)


def class_tars(folder: Path, images: Images) -> str:
    folder.mkdir()
    for name, files in images.items():
        (folder / f"{name}.tar").write_bytes(tar_of(files))
    return str(folder)


def imagenet_tar(folder: Path, images: Images) -> str:
    folder.mkdir()
    path = folder / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_of({f"{name}.tar": tar_of(files) for name, files in images.items()}))
    return str(path)


def web_dataset(folder: Path, images: Images) -> str:
    """Write two tars with webdataset's own writer and the members of timm's ImageNet-1k: jpg, cls, json."""
    folder.mkdir()
    samples = [
        (label, name, file, data)
        for label, (name, files) in enumerate(sorted(images.items()))
        for file, data in sorted(files.items())
    ]
    half = len(samples) // 2
    for number, part in enumerate((samples[:half], samples[half:])):
        with webdataset.TarWriter(str(folder / f"train-{number:04d}.tar")) as writer:
            for label, name, file, data in part:
                stem, suffix = file.split(".")
                facts = {"filename": file, "label": label, "class_name": name}
                writer.write({"__key__": stem, suffix.lower(): data, "cls": label, "json": facts})
    return str(folder)


def parquet(folder: Path, images: Images, rows_per_group: int = 3) -> str:
    """Write two Parquet files in the form of Hugging Face."""
    folder.mkdir()
    rows = [
        ({"bytes": data, "path": file}, label)
        for label, (_, files) in enumerate(sorted(images.items()))
        for file, data in sorted(files.items())
    ]
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        write_parquet(folder / f"train-{number:05d}-of-00002.parquet", part, sorted(images), rows_per_group)
    return str(folder)


def write_parquet(
    path: Path,
    rows: list[tuple[dict[str, object] | None, int | None]],
    class_names: list[str],
    rows_per_group: int = 3,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": class_names, "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", image), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})} if class_names else None,
    )
    table = pa.table({"image": [row[0] for row in rows], "label": [row[1] for row in rows]}, schema=schema)
    pyarrow.parquet.write_table(
        table, path, row_group_size=rows_per_group, data_page_size=1000, write_page_checksum=True
    )


ARCHIVES: dict[str, Callable[[Path, Images], str]] = {
    "class_tars": class_tars,
    "imagenet_tar": imagenet_tar,
    "webdataset": web_dataset,
    "parquet": parquet,
}
KINDS = {"class_folders": class_folders, **ARCHIVES}


def upload(source: str, url: str) -> str:
    """Copy a folder or a file to a URL and return its new URL."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    storage = open_storage(url)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            storage.write(file.relative_to(folder).as_posix(), file.read_bytes())
    return url if path.is_dir() else f"{url}/{path.name}"


@dataclass
class Reads:
    """The reads from storages in this process."""

    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    """(key, start, bytes)"""
    whole: list[str] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(length for _, _, length in self.ranges)

    def clear(self) -> None:
        for rows in (self.ranges, self.whole, self.listed):
            rows.clear()


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Record each read of a folder or bucket from now on."""
    reads = Reads()
    for kind in (DiskStorage, S3Storage):
        read_range, read, listing = kind.read_range, kind.read, kind.list

        def ranged(self, key, start, length, read_range=read_range):  # type: ignore[no-untyped-def]
            reads.ranges.append((key, start, length))
            return read_range(self, key, start, length)

        def whole(self, key, read=read):  # type: ignore[no-untyped-def]
            reads.whole.append(key)
            return read(self, key)

        def listed(self, prefix="", listing=listing):  # type: ignore[no-untyped-def]
            reads.listed.append(prefix)
            return listing(self, prefix)

        monkeypatch.setattr(kind, "read_range", ranged)
        monkeypatch.setattr(kind, "read", whole)
        monkeypatch.setattr(kind, "list", listed)
    return reads
