"""What a rank owns of a run's state: flat buffers, and which runs of which parameters lie in them."""

from dataclasses import dataclass

from torch import Tensor

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"
OPTIMIZER_KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ)


@dataclass(frozen=True)
class Extent:
    """A run of elements of one flattened parameter, and where it lies in a partition's flat buffers."""

    parameter: str
    start: int
    """First element within the flattened parameter."""
    length: int
    offset: int
    """First element within the flat buffers."""


@dataclass(frozen=True)
class Partition:
    """What this rank owns of one optimizer group: flat fp32 buffers of the same layout, by kind."""

    buffers: dict[str, Tensor]
    extents: tuple[Extent, ...]
