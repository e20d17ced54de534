"""The work of one decoding task: entries of the listing in, uint8 crops out.

An input that yields no sample is reported, not skipped. The reason is the same on every machine.
"""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dit_scale.data.pixels import Pixels, center_crop, decode, to_array
from dit_scale_pipeline.inputs import COLUMNS, Entry, Input, InputError, open_input

READ_THREADS = 8
"""Images fetched in parallel from a remote source."""


@dataclass(frozen=True)
class DecodedBatch:
    """The outcome of a batch: the decoded entries in order, and (entry, reason) of the rejected ones."""

    decoded: tuple[Entry, ...]
    rejected: tuple[tuple[Entry, str], ...]

    def __len__(self) -> int:
        return len(self.decoded) + len(self.rejected)


def read_batch(
    source: str, kind: str, entries: Sequence[Entry], size: int, columns: tuple[str, str] = COLUMNS
) -> tuple[Pixels, DecodedBatch]:
    """Read, decode and crop entries => uint8 (decoded entries, size, size, 3) and the outcome.

    `kind` and `columns` are those of the listing.
    """
    pixels = np.empty((len(entries), size, size, 3), np.uint8)
    decoded: list[Entry] = []
    rejected: list[tuple[Entry, str]] = []
    for entry, data in zip(entries, _read(_opened(source, kind, columns), entries), strict=True):
        try:
            if isinstance(data, InputError):
                raise data
            pixels[len(decoded)] = to_array(center_crop(decode(data), size))
            decoded.append(entry)
        except InputError as error:
            rejected.append((entry, str(error)))
    return pixels[: len(decoded)], DecodedBatch(tuple(decoded), tuple(rejected))


_opened = functools.lru_cache(maxsize=4)(open_input)


def _read(source: Input, entries: Sequence[Entry]) -> Iterator[bytes | InputError]:
    def read(entry: Entry) -> bytes | InputError:
        try:
            return source.read(entry)
        except InputError as error:
            return error

    if not source.remote:
        yield from map(read, entries)
        return
    with ThreadPoolExecutor(READ_THREADS) as pool:
        yield from pool.map(read, entries)
