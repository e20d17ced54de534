"""What a rank owns of a run's state: flat buffers and the slices of parameters in them. Loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"
OPTIMIZER_KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ)


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
class Partition:
    """What a rank owns of one optimizer group: flat fp32 buffers, one per kind, with the same layout."""

    buffers: "dict[str, Tensor]"
    slices: tuple[ParameterSlice, ...]
