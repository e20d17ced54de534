"""Slices of flattened parameters, in memory and in a rank's file. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterSlice:
    """A run of elements of one flattened parameter, and its place in flat fp32 memory."""

    parameter: str
    start: int
    """First element within the flattened parameter."""
    length: int
    """Number of elements."""
    offset: int
    """First element within the flat memory: a buffer of a partition, or a snapshot."""


StateSlices = Sequence[tuple[str, ParameterSlice]]
"""The state in one flat memory: (kind, slice)."""


@dataclass(frozen=True)
class StoredSlice:
    """One tensor of a rank file: a run of elements of one kind of state of one flattened parameter."""

    kind: str
    parameter: str
    start: int
    """First element within the flattened parameter."""
    length: int
    """Number of elements."""
    byte_offset: int
    """First byte within the file."""
    crc32c: tuple[int, ...]
    """CRC-32C of each block of `rankfile.BLOCK_BYTES`; the last block may be shorter."""

    @property
    def bytes(self) -> int:
        return 4 * self.length
