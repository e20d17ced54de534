"""Training in a single process: no sharding, no collectives, and none of the copies that sharding needs.

Masters and moments are flat fp32 buffers, as ZeRO's are. The optimizer updates views of them that have the
shapes of the parameters. In fp32 the masters are the weights, so the optimizer reads the gradients where the
backward pass left them. In bf16 the weights are a cast of the masters, and fp32 sums of the gradients exist
from the first micro-step to the update.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import inf

import torch
from torch import Tensor, nn

from dit_scale.checkpoint.partition import EXP_AVG, EXP_AVG_SQ, MASTER, Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import OptimizerConfig
from dit_scale.train.grad_norm import gradient_norm
from dit_scale.train.optim import build_optimizer, set_moments


class OneProcess:
    """A model that this process owns completely."""

    def __init__(
        self, model: nn.Module, precision: str, config: OptimizerConfig, device: torch.device
    ) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.module = model.to(device, dtype)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._weights = list(trained.values())
        self._master = torch.cat([weight.detach().flatten().float() for weight in self._weights])
        self._cast = self._master.to(dtype)  # the same tensor in fp32
        for weight, view in zip(self._weights, views(self._cast, self._weights), strict=True):
            weight.data = view
        same = self._cast is self._master
        self.masters: Sequence[Tensor] = self._weights if same else list(views(self._master, self._weights))
        self.optimizer = build_optimizer(self.masters, config, device)
        buffers = {MASTER: self._master}
        for kind in (EXP_AVG, EXP_AVG_SQ):
            buffers[kind] = torch.zeros_like(self._master)
        moments = (views(buffers[kind], self._weights) for kind in (EXP_AVG, EXP_AVG_SQ))
        for master, exp_avg, exp_avg_sq in zip(self.masters, *moments, strict=True):
            set_moments(self.optimizer, master, exp_avg, exp_avg_sq)
        self.owned: tuple[Partition, ...] = (Partition(buffers, tuple(slices(trained))),)
        self._clip = config.clip_grad_norm
        self._norm = torch.zeros((), device=device)

    def __call__(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.module(*inputs)
        return output

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one micro-step to that of the step."""
        loss.backward()
        if self._cast is not self._master:
            self._sum_in_fp32()

    @torch.no_grad()
    def step(self) -> None:
        """Compute the gradient norm, clip, update the masters, and cast them into the weights."""
        gradients = [master.grad for master in self.masters if master.grad is not None]
        self._norm = gradient_norm(gradients).nan_to_num(nan=inf, posinf=inf)
        if self._clip:
            torch._foreach_mul_(gradients, 1.0 / ((self._norm + 1e-6) / self._clip).clamp(min=1.0))
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
        self.publish_masters()

    def grad_norm(self) -> Tensor:
        """The norm of the gradient in the current or last step, before clipping."""
        return self._norm

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Cast the masters into the weights, unless they are the weights."""
        if self._cast is not self._master:
            self._cast.copy_(self._master)

    def _sum_in_fp32(self) -> None:
        """Move the gradients of a micro-step from the weights to the masters."""
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        sums = [master.grad for master in self.masters if master.grad is not None]
        if sums:
            torch._foreach_add_(sums, gradients)
        else:
            sums = list(views(torch.empty_like(self._master), self._weights))
            torch._foreach_copy_(sums, gradients)
            for master, total in zip(self.masters, sums, strict=True):
                master.grad = total
        for weight in self._weights:
            weight.grad = None


def views(flat: Tensor, like: Iterable[Tensor]) -> Iterator[Tensor]:
    """Cut a flat buffer into consecutive views with the shapes of other tensors."""
    offset = 0
    for tensor in like:
        yield flat[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()


def slices(parameters: dict[str, nn.Parameter]) -> Iterator[ParameterSlice]:
    """Where each parameter is in a flat buffer."""
    offset = 0
    for name, parameter in parameters.items():
        yield ParameterSlice(name, 0, parameter.numel(), offset)
        offset += parameter.numel()
