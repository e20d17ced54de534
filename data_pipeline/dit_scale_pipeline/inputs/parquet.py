"""Parquet files as Hugging Face has ImageNet-1k: columns image {bytes, path} and label; the door to pyarrow.

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
from dit_scale.storage import MissingKeyError
from dit_scale_pipeline.inputs.archives import ArchiveInput, Found, Part, checked_label
from dit_scale_pipeline.inputs.base import Entry, InputError
from dit_scale_pipeline.inputs.places import Place
from dit_scale_pipeline.inputs.ranged import RangedFile

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

CACHED = 2
"""Row groups in memory, and files open: readers that run side by side stand in two at most, mostly."""


class Parquet(ArchiveInput):
    """Parquet files with an image and its label in each row."""

    kind = "parquet"
    suffix = ".parquet"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._lock = threading.Lock()
        self._file = functools.lru_cache(CACHED)(self._open_file)
        self._rows = functools.lru_cache(CACHED)(self._read_group)

    def list_part(self, part: Part) -> Found:
        with self._errors(part.key):
            file = _open(RangedFile(self.storage, part.key, part.start, part.end))
            labels_N = file.read(["label"], use_threads=False).column("label")
        if labels_N.null_count:
            raise DataError(f"{self.url}: {part.key} has rows without a label; expected a number in each")
        names = _class_names(file)
        found = Found(class_names=dict(enumerate(names)))
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
        return rows["label"][at].as_py(), rows["image"][at].as_py()

    def _open_file(self, key: str) -> "tuple[ParquetFile, npt.NDArray[np.int64]]":
        """A file, and the row behind each of its row groups."""
        file = _open(RangedFile(self.storage, key, 0, self.storage.size(key)))
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return file, np.cumsum(sizes)

    def _read_group(self, key: str, group: int) -> "Table":
        return self._file(key)[0].read_row_group(group, ["label", "image.bytes"], use_threads=False)

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
            raise DataError(
                f"{self.url}: {key} cannot be read as Parquet ({error}). Compare its size and checksum with "
                "the original's, and copy it again"
            ) from None


def _open(file: RangedFile) -> "ParquetFile":
    """A file with the columns that are needed; ArrowException, OSError or DataError."""
    from pyarrow import types
    from pyarrow.parquet import ParquetFile

    # A column of a row group is one read, whatever its pages; a file with a buffer would keep it all.
    parquet = ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
    columns = {column.name: column.type for column in parquet.schema_arrow}
    image, label = columns.get("image"), columns.get("label")
    has_bytes = image is not None and types.is_struct(image) and image.get_field_index("bytes") >= 0
    if not has_bytes or label is None or not types.is_integer(label):
        found = ", ".join(f"{name} ({type_})" for name, type_ in columns.items())
        raise DataError(
            f"{file.name}: expected columns image (struct with bytes) and label (integer), found {found}"
        )
    return parquet


def _class_names(file: "ParquetFile") -> list[str]:
    """Names by label, as Hugging Face writes them into the schema; none when they are not there."""
    try:
        told = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
        names = told["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
