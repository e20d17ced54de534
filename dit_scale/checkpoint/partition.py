"""What a rank owns of a run's state: flat buffers and the slices of parameters in them."""

from dataclasses import dataclass

from torch import Tensor

from dit_scale.checkpoint.slices import ParameterSlice

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"
OPTIMIZER_KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ)


@dataclass(frozen=True)
class Partition:
    """What a rank owns of one optimizer group: flat fp32 buffers, one per kind, with the same layout."""

    buffers: dict[str, Tensor]
    slices: tuple[ParameterSlice, ...]
