"""Parquet files as Hugging Face has ImageNet-1k: columns image {bytes, path} and label; the door to pyarrow.

The columns may have other names.

Listing reads the footers and the labels. An image is read with its row group, which stays in memory for
the ones that come next.
"""

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dit_scale.errors import DataError
from dit_scale.storage import MissingKeyError, Storage
from dit_scale_pipeline.inputs.archives import ArchiveImages, ArchiveInput, ArchiveRange, checked_label
from dit_scale_pipeline.inputs.base import COLUMNS, Entry, InputError
from dit_scale_pipeline.inputs.contents import HEAD_BYTES, what_it_is
from dit_scale_pipeline.inputs.names import few, shown
from dit_scale_pipeline.inputs.places import InputPlace
from dit_scale_pipeline.inputs.ranged import RangedFile

if TYPE_CHECKING:
    from pyarrow import DataType, Schema, Table
    from pyarrow.parquet import ParquetFile

CACHED = 2
"""Row groups in memory, and files open: readers that run side by side stand in two at most, mostly."""


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

    def list_archive(self, part: ArchiveRange) -> ArchiveImages:
        with self._errors(part.key):
            file = self._open(RangedFile(self.storage, part.key, part.start, part.end))
            _check_bytes(file, self.columns[0], f"{self.url}: {part.key}")
            labels_N = file.read([self.columns[1]], use_threads=False).column(self.columns[1])
        if labels_N.null_count:
            raise DataError(f"{self.url}: {part.key} has rows without a label; expected a number in each")
        names = _class_names(file, self.columns[1])
        found = ArchiveImages(class_names=dict(enumerate(names)))
        for row, label in enumerate(labels_N.to_pylist()):
            where = f"{self.url}: row {row} of {part.key}"
            if names and label >= len(names):
                raise DataError(f"{where}: label {label}, but the file has names of {len(names)} classes")
            found.add(f"{part.key}/{row:08d}", checked_label(label, where), row, 0)
        return found

    def read(self, entry: Entry) -> bytes:
        with self._lock, self._errors(entry.archive):
            label, image = self._row(entry)
        if label != entry.label:
            raise DataError(
                f"{self.url}: {entry.archive} changed since it was listed: row {entry.start} had label "
                f"{entry.label}, now {label}. Put the file of the listing back, or begin another output"
            )
        if image is None or image["bytes"] is None:
            raise InputError("the row has no image")
        return image["bytes"]

    def _row(self, entry: Entry) -> tuple[int | None, dict[str, bytes | None] | None]:
        """Label and image of a row; no label where there is no row."""
        _, ends = self._file(entry.archive)
        group = int(np.searchsorted(ends, entry.start, side="right"))
        if group == len(ends):
            return None, None
        rows = self._rows(entry.archive, group)
        at = entry.start - int(ends[group]) + len(rows)
        image, label = self.columns
        return rows[label][at].as_py(), rows[image][at].as_py()

    def _open_file(self, key: str) -> "tuple[ParquetFile, npt.NDArray[np.int64]]":
        """A file, and the row behind each of its row groups."""
        file = self._open(RangedFile(self.storage, key, 0, self.storage.size(key)))
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return file, np.cumsum(sizes)

    def _read_group(self, key: str, group: int) -> "Table":
        return self._file(key)[0].read_row_group(
            group, [self.columns[1], f"{self.columns[0]}.bytes"], use_threads=False
        )

    def _open(self, file: RangedFile) -> "ParquetFile":
        """A file with the columns that are needed; ArrowException, OSError or DataError."""
        from pyarrow.parquet import ParquetFile

        # A column of a row group is one read, whatever its pages; a file with a buffer would keep it all.
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
                f"{self.url}: {key} is in the listing but not here; if it was deleted, begin another output, "
                "else make the source visible on every node and start again"
            ) from None
        except (ArrowException, OSError) as error:
            what = what_it_is(_head(self.storage, key))
            if what and "Parquet" not in what:
                raise DataError(
                    f"{self.url}/{key}: expected a Parquet file, found a file that {what}"
                ) from None
            raise DataError(
                f"{self.url}: {key} cannot be read as Parquet ({error}). Compare its size and checksum with "
                "the original's, and copy it again"
            ) from None


def _head(storage: Storage, key: str) -> bytes:
    return storage.read_range(key, 0, min(storage.size(key), HEAD_BYTES))


def _has_bytes(type_: "DataType") -> bool:
    from pyarrow import types

    return types.is_struct(type_) and type_.get_field_index("bytes") >= 0


def _check_columns(schema: "Schema", wanted: tuple[str, str], where: str) -> None:
    """DataError for a file without these columns of images and labels, or with other kinds of them."""
    from pyarrow import types

    columns = {column.name: column.type for column in schema}
    image, label = (columns.get(name) for name in wanted)
    if image is not None and _has_bytes(image) and label is not None and types.is_integer(label):
        return
    found = ", ".join(f"{shown(name)} ({type_})" for name, type_ in columns.items())
    if image is not None and _has_bytes(image) and label is not None:
        advice = (
            f"Column {wanted[1]} holds no numbers: write each class as its number, from 0 on "
            "(class_encode_column of Hugging Face datasets does)"
        )
    else:
        images = [name for name, type_ in columns.items() if _has_bytes(type_)]
        labels = [name for name, type_ in columns.items() if types.is_integer(type_)]
        named = [
            f"{option}={names[0] if len(names) == 1 else '...'}"
            + (f" (one of {few(names)})" if len(names) > 1 else "")
            for option, names in (("image_column", images), ("label_column", labels))
        ]
        advice = f"Name them: {' '.join(named)}"
    raise DataError(
        f"{where}: expected columns {wanted[0]} (struct with bytes) and {wanted[1]} (integer), "
        f"found {found}. {advice}"
    )


def _check_bytes(file: "ParquetFile", image: str, where: str) -> None:
    """DataError when no row holds the bytes of its image, as far as the footer tells."""
    names = [file.schema.column(number).path for number in range(len(file.schema))]
    column, metadata = names.index(f"{image}.bytes"), file.metadata
    chunks = [metadata.row_group(group).column(column) for group in range(file.num_row_groups)]
    known = [chunk.statistics for chunk in chunks if chunk.is_stats_set and chunk.statistics.has_null_count]
    nulls = sum(statistics.null_count for statistics in known)
    if metadata.num_rows and len(known) == len(chunks) and nulls == metadata.num_rows:
        raise DataError(
            f"{where}: {image}.bytes is empty in all {nulls} rows: the file holds the paths of its images at "
            "most. Write it with their bytes, or encode the folder of the images"
        )


def _class_names(file: "ParquetFile", label: str) -> list[str]:
    """Names by label, as Hugging Face writes them into the schema; none when they are not there."""
    try:
        told = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
        names = told["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
