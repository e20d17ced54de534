"""Parquet files in the form of ImageNet-1k on Hugging Face: columns image {bytes, path} and label.

The columns may have other names. Listing reads the footers and the labels. Reading an image reads its row
group, which stays cached for the next images. Only this module imports pyarrow.
"""

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dit_scale.data.pixels import InputError
from dit_scale.errors import DataError
from dit_scale.storage import MissingKeyError, Storage
from dit_scale_pipeline.inputs.archives import ArchiveImages, ArchiveInput, ArchiveRange, checked_label
from dit_scale_pipeline.inputs.base import COLUMNS, Entry
from dit_scale_pipeline.inputs.contents import HEAD_BYTES, describe_file
from dit_scale_pipeline.inputs.names import few, printable
from dit_scale_pipeline.inputs.places import InputPlace
from dit_scale_pipeline.inputs.ranged import RangedFile

if TYPE_CHECKING:
    from pyarrow import DataType, Schema, Table
    from pyarrow.parquet import ParquetFile

CACHED = 2
"""Cached row groups and open files; concurrent readers rarely use more than two."""


class Parquet(ArchiveInput):
    """Parquet files with an image and its label in each row."""

    kind = "parquet"
    suffix = ".parquet"

    def __init__(self, place: InputPlace, columns: tuple[str, str] = COLUMNS) -> None:
        super().__init__(place)
        self.columns = columns
        self._lock = threading.Lock()
        self._file = functools.lru_cache(CACHED)(self._open_file)
        self._rows = functools.lru_cache(CACHED)(self._read_group)

    def list_archive(self, archive: ArchiveRange) -> ArchiveImages:
        with self._errors(archive.key):
            file = self._open(RangedFile(self.storage, archive.key, archive.start, archive.end))
            _check_bytes(file, self.columns[0], f"{self.url}: {archive.key}")
            labels_N = file.read([self.columns[1]], use_threads=False).column(self.columns[1])
        if labels_N.null_count:
            raise DataError(
                f"{self.url}: {archive.key} has rows without a label; expected a number in each row"
            )
        names = _class_names(file, self.columns[1])
        images = ArchiveImages(class_names=dict(enumerate(names)))
        for row, label in enumerate(labels_N.to_pylist()):
            where = f"{self.url}: row {row} of {archive.key}"
            if names and label >= len(names):
                raise DataError(f"{where}: label {label}, but the schema names {len(names)} classes")
            images.add(f"{archive.key}/{row:08d}", checked_label(label, where), row, 0)
        return images

    def read(self, entry: Entry) -> bytes:
        with self._lock, self._errors(entry.archive):
            label, image = self._row(entry)
        if label != entry.label:
            raise DataError(
                f"{self.url}: {entry.archive} changed since it was listed: the label of row {entry.start} "
                f"was {entry.label} and is {label} now. Restore the file, or start a new output"
            )
        if image is None or image["bytes"] is None:
            raise InputError("the row has no image")
        return image["bytes"]

    def _row(self, entry: Entry) -> tuple[int | None, dict[str, bytes | None] | None]:
        """Return label and image of a row, or None for both if the row does not exist."""
        _, ends = self._file(entry.archive)
        group = int(np.searchsorted(ends, entry.start, side="right"))
        if group == len(ends):
            return None, None
        rows = self._rows(entry.archive, group)
        at = entry.start - int(ends[group]) + len(rows)
        image, label = self.columns
        return rows[label][at].as_py(), rows[image][at].as_py()

    def _open_file(self, key: str) -> "tuple[ParquetFile, npt.NDArray[np.int64]]":
        """Open a file; also return the end row of each row group."""
        file = self._open(RangedFile(self.storage, key, 0, self.storage.size(key)))
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return file, np.cumsum(sizes)

    def _read_group(self, key: str, group: int) -> "Table":
        return self._file(key)[0].read_row_group(
            group, [self.columns[1], f"{self.columns[0]}.bytes"], use_threads=False
        )

    def _open(self, file: RangedFile) -> "ParquetFile":
        """Open a file and check its columns; ArrowException, OSError or DataError."""
        from pyarrow.parquet import ParquetFile

        # One read per column of a row group, regardless of pages; a buffered file would keep all of it.
        parquet = ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
        _check_columns(parquet.schema_arrow, self.columns, file.name)
        return parquet

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except MissingKeyError:
            raise DataError(
                f"{self.url}: {key} is in the listing but does not exist here. If it was deleted, start a "
                "new output; otherwise make the source visible on every node and start again"
            ) from None
        except (ArrowException, OSError) as error:
            what = describe_file(_head(self.storage, key))
            if what and "Parquet" not in what:
                raise DataError(
                    f"{self.url}/{key}: expected a Parquet file, got a file that {what}"
                ) from None
            raise DataError(
                f"{self.url}: {key} cannot be read as Parquet ({error}). Compare its size and checksum with "
                "the original, and copy it again"
            ) from None


def _head(storage: Storage, key: str) -> bytes:
    return storage.read_range(key, 0, min(storage.size(key), HEAD_BYTES))


def _has_bytes(type_: "DataType") -> bool:
    from pyarrow import types

    return types.is_struct(type_) and type_.get_field_index("bytes") >= 0


def _check_columns(schema: "Schema", wanted: tuple[str, str], where: str) -> None:
    """DataError when the image or label column is missing or has another type."""
    from pyarrow import types

    columns = {column.name: column.type for column in schema}
    image, label = (columns.get(name) for name in wanted)
    if image is not None and _has_bytes(image) and label is not None and types.is_integer(label):
        return
    found = ", ".join(f"{printable(name)} ({type_})" for name, type_ in columns.items())
    if image is not None and _has_bytes(image) and label is not None:
        advice = (
            f"Column {wanted[1]} is not numeric: write each class as a number, starting at 0 "
            "(class_encode_column of Hugging Face datasets does this)"
        )
    else:
        images = [name for name, type_ in columns.items() if _has_bytes(type_)]
        labels = [name for name, type_ in columns.items() if types.is_integer(type_)]
        named = [
            f"{option}={names[0] if len(names) == 1 else '...'}"
            + (f" (one of {few(names)})" if len(names) > 1 else "")
            for option, names in (("image_column", images), ("label_column", labels))
        ]
        advice = f"Set {' '.join(named)}"
    raise DataError(
        f"{where}: expected columns {wanted[0]} (struct with bytes) and {wanted[1]} (integer), "
        f"got {found}. {advice}"
    )


def _check_bytes(file: "ParquetFile", image: str, where: str) -> None:
    """DataError when the footer shows that no row contains the bytes of its image."""
    names = [file.schema.column(number).path for number in range(len(file.schema))]
    column, metadata = names.index(f"{image}.bytes"), file.metadata
    chunks = [metadata.row_group(group).column(column) for group in range(file.num_row_groups)]
    known = [chunk.statistics for chunk in chunks if chunk.is_stats_set and chunk.statistics.has_null_count]
    nulls = sum(statistics.null_count for statistics in known)
    if metadata.num_rows and len(known) == len(chunks) and nulls == metadata.num_rows:
        raise DataError(
            f"{where}: {image}.bytes is empty in all {nulls} rows: the file contains only the paths of its "
            "images. Write it with their bytes, or encode the folder of the images"
        )


def _class_names(file: "ParquetFile", label: str) -> list[str]:
    """Return the class names that Hugging Face stores in the schema, by label; empty if there are none."""
    try:
        metadata = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
        names = metadata["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
