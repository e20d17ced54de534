"""AdamW and a moving average of the masters in one pass: 36 bytes of memory traffic per parameter.

torch's fused AdamW moves 28 bytes, and an average after it 12, because it reads the master again. The result
is theirs up to the rounding of fp32.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

State = tuple[Tensor, ...]
"""A master, its gradient and both moments, contiguous."""

ELEMENTS = 1024
"""Parameters per program."""


@triton.jit(do_not_specialize=["lr", "weight_decay", "weight"])
def adamw_kernel(
    master_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    average_ptr,
    updates_ptr,
    skip_ptr,
    num,
    lr,
    weight_decay,
    rest1,
    rest2,
    log_beta1,
    log_beta2,
    eps,
    weight,
    HAS_AVERAGE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Update in place; if `skip` is 1, only the average moves. `rest1` and `rest2` are 1 - beta."""
    offset = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    exists = offset < num
    old = tl.load(master_ptr + offset, mask=exists)
    grad = tl.load(grad_ptr + offset, mask=exists).to(tl.float32)
    old_avg = tl.load(exp_avg_ptr + offset, mask=exists)
    old_avg_sq = tl.load(exp_avg_sq_ptr + offset, mask=exists)
    # Loshchilov & Hutter 2019, Algorithm 2. In fp32, 1 - beta**t would lose its digits for the first steps.
    updates = tl.load(updates_ptr).to(tl.float64)
    correction1 = (1.0 - tl.exp(updates * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(updates * log_beta2)).to(tl.float32)
    exp_avg = old_avg + rest1 * (grad - old_avg)
    exp_avg_sq = old_avg_sq + rest2 * (grad * grad - old_avg_sq)
    master = old - lr * weight_decay * old
    master -= lr / correction1 * exp_avg / (tl.sqrt(exp_avg_sq) / tl.sqrt(correction2) + eps)
    skip = tl.load(skip_ptr) == 1.0
    master = tl.where(skip, old, master)
    tl.store(master_ptr + offset, master, mask=exists)
    tl.store(exp_avg_ptr + offset, tl.where(skip, old_avg, exp_avg), mask=exists)
    tl.store(exp_avg_sq_ptr + offset, tl.where(skip, old_avg_sq, exp_avg_sq), mask=exists)
    if HAS_AVERAGE:
        average = tl.load(average_ptr + offset, mask=exists)
        # As torch.lerp, which is exact at both ends and rounds once.
        way = master - average
        near, far = tl.fma(way, weight, average), tl.fma(way, weight - 1.0, master)
        moved = tl.where(weight < 0.5, near, far)
        tl.store(average_ptr + offset, moved, mask=exists)


class TritonAdamW(torch.optim.AdamW):
    """AdamW whose update can move averages of the masters; its state is that of torch's fused AdamW.

    Set `found_inf`, fp32 () on the device, before a step: 1.0 skips the update, but not the averages.
    """

    def __init__(self, masters: Iterable[Tensor], **settings: Any) -> None:
        super().__init__(masters, fused=True, **settings)
        self.found_inf = torch.zeros(())
        self.followers: dict[int, tuple[Tensor, float]] = {}
        """Address of a flat buffer of masters => its average, and the weight by which the next step moves it.

        The step removes the averages that it has moved.
        """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all masters that have a gradient."""
        for group in self.param_groups:
            masters: list[Tensor] = []
            others: tuple[list[Tensor], ...] = ([], [], [], [], [])
            self._init_group(group, masters, *others)
            grads, exp_avgs, exp_avg_sqs, _, updates = others
            torch._foreach_add_(updates, 1.0 - self.found_inf)
            states = zip(masters, grads, exp_avgs, exp_avg_sqs, strict=True)
            for state, count in merge_neighbours(zip(states, updates, strict=True)):
                self._launch(group, state, count)

    def _launch(self, group: dict[str, Any], state: State, updates: Tensor) -> None:
        master, *_ = state
        num = master.numel()
        average, weight = self.followers.get(master.data_ptr(), (master, 0.0))
        follows = average is not master and average.numel() == num
        beta1, beta2 = group["betas"]
        with torch.cuda.device_of(master):
            adamw_kernel[(triton.cdiv(num, ELEMENTS),)](
                *state,
                average,
                updates,
                self.found_inf,
                num,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                rest1=1.0 - beta1,
                rest2=1.0 - beta2,
                log_beta1=math.log(beta1) if beta1 else -math.inf,
                log_beta2=math.log(beta2) if beta2 else -math.inf,
                eps=group["eps"],
                weight=weight,
                HAS_AVERAGE=follows,
                SIZE=ELEMENTS,
            )
        if follows:
            del self.followers[master.data_ptr()]


def merge_neighbours(states: Iterable[tuple[State, Tensor]]) -> Iterator[tuple[State, Tensor]]:
    """Yield states with their counts of updates; neighbours in memory become one state."""
    runs: list[tuple[list[State], Tensor]] = []
    for state, updates in states:
        if runs and all(map(_neighbours, runs[-1][0][-1], state)):
            runs[-1][0].append(state)
        else:
            runs.append(([state], updates))
    for run, updates in runs:
        num = sum(master.numel() for master, *_ in run)
        yield tuple(tensor.as_strided((num,), (1,)) for tensor in run[0]), updates


def _neighbours(left: Tensor, right: Tensor) -> bool:
    same = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    return same and left.data_ptr() + left.nbytes == right.data_ptr()
