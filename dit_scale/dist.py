"""Who am I among the processes of this run, and the few collectives that the code above needs.

A process is started plainly (world of one) or by a launcher that sets RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT (deepspeed, torchrun). NCCL carries tensors on CUDA, gloo on CPU; a gloo
group beside it carries small host values, so that agreeing on them never waits for the device.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

# Its functions keep the group that is there when they are defined. Loaded later, as by torch._dynamo, they
# would keep gloo's threads alive in a process that ends, and what is left to a thread then may abort it.
import torch.distributed.nn.functional
from torch import Tensor

from dit_scale.config import EngineConfig
from dit_scale.errors import ConfigError, DeviceError

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among its peers. Made by `start`, ended by `stop`."""

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place, on the device."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable host value, in rank order, on all ranks."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return [value for value in values if value is not None]

    def broadcast(self, say: Callable[[], T]) -> T:
        """Call `say` on rank 0 alone; its value, or its error, reaches all ranks."""
        answer: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.is_first:
            try:
                answer = [(say(), None)]
            except Exception as error:  # carried to the other ranks and raised on all of them
                answer = [(None, error)]
        dist.broadcast_object_list(answer, src=0, group=self.host_group)
        value, problem = answer[0]
        if problem is not None:
            raise problem
        return value  # type: ignore[return-value]

    def start_vote(self, *flags: bool) -> "Vote":
        """Start asking, of each flag, whether any rank has it up; the answers are read later."""
        vote = torch.tensor([int(flag) for flag in flags])
        return Vote(vote, dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.host_group, async_op=True))

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)


@dataclass(frozen=True)
class Vote:
    """A vote under way."""

    vote: Tensor
    work: dist.Work

    def result(self) -> tuple[bool, ...]:
        """One answer per flag, the same on all ranks."""
        self.work.wait()
        return tuple(bool(flag) for flag in self.vote.tolist())


def choose_device(name: str) -> torch.device:
    """`auto` takes this process's CUDA device when there is one. Raises DeviceError for a missing one."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise DeviceError("device=cuda was asked for and no CUDA device is visible; use device=auto or cpu")
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has matrix instructions for bf16: CUDA from capability 8.0 on, AMX or AVX512-BF16 and
    their like on a CPU. Elsewhere torch converts to fp32 and back, 8 to 10 times slower than fp32 alone."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # oneDNN says what it may use (ONEDNN_MAX_CPU_ISA can forbid it), but counts emulation on AVX512, too.
    capabilities = torch.cpu.get_capabilities()
    has_instructions = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return has_instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_precision(name: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """`auto` takes bf16 where the device multiplies it in hardware, else fp32."""
    if name == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    return "bf16" if name == "bf16" else "fp32"


SLOW_BF16 = "this CPU has no bf16 instructions: 8 to 10 times slower than fp32; auto would take fp32"
"""What to say when bf16 was asked for and `multiplies_bf16` is false."""


def start(config: EngineConfig) -> World:
    """Join the process group.

    Raises DeviceError, also for a port that is taken, or ConfigError for a half-set launcher environment.
    """
    device = choose_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(config.cpu_threads)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        needed = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if needed:
            raise ConfigError(
                f"RANK is set but {', '.join(needed)} not: use the deepspeed launcher, or unset RANK"
            )
        try:
            dist.init_process_group(backend, timeout=_TIMEOUT)
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise DeviceError(
                f"port {os.environ['MASTER_PORT']} of this machine is taken (EADDRINUSE), expected it free "
                "for the ranks to meet: does another run use it? Give the launcher another one, `deepspeed "
                "--master_port NUMBER`; `dit-scale launch` takes one that is free at every try"
            ) from None
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    host_group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=_TIMEOUT)
    assert host_group is not None
    return World(dist.get_rank(), dist.get_world_size(), device, host_group)


def stop() -> None:
    """Leave the process group; safe to call when none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
