"""Complete weights in a second model: the masters or an average, gathered from the ranks that own them."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dit_scale.checkpoint.partition import Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.dist import World


@torch.no_grad()
def gather_weights(model: nn.Module, kind: str, owned: Iterable[Partition], world: World) -> None:
    """Fill `model` with this kind of state, cast to the type of its parameters. All ranks call this together.

    One parameter at a time, so that no rank needs memory for more than the model and one fp32 parameter.
    Every rank puts its slices into zeros, and the sum over ranks is exact: each element has one owner.
    """
    pieces: dict[str, list[tuple[ParameterSlice, Tensor]]] = defaultdict(list)
    for partition in owned:
        for slice_ in partition.slices:
            pieces[slice_.parameter].append((slice_, partition.buffers[kind]))
    for name, parameter in model.named_parameters():
        whole = torch.zeros(parameter.numel(), device=world.device)
        for slice_, buffer in pieces[name]:
            end = slice_.start + slice_.length
            whole[slice_.start : end] = buffer[slice_.offset : slice_.offset + slice_.length]
        parameter.copy_(world.sum(whole).view_as(parameter))
