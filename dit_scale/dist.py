"""The process group: rank, world size, device, and the few collectives that training needs.

A process starts alone (world size 1) or from a launcher such as deepspeed or torchrun, which sets RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Tensors travel over NCCL on CUDA and over gloo on a
CPU. Small host values always travel over gloo, so agreeing on them never waits for the device.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

# This module's functions capture the process group that exists at import time. If torch._dynamo imported them
# later, they would keep gloo's threads alive while the process exits, and such a thread can abort it.
import torch.distributed.nn.functional
from torch import Tensor

from dit_scale import host_memory
from dit_scale.config import EngineConfig
from dit_scale.errors import ConfigError, DeviceError

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """The process group as this process sees it. `start` creates it and `stop` leaves it."""

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a device tensor over all ranks, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Gather a picklable host value from every rank, in rank order, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return [value for value in values if value is not None]

    def broadcast(self, compute: Callable[[], T]) -> T:
        """Call `compute` on rank 0 and return its value, or raise its exception, on all ranks."""
        answer: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.is_first:
            try:
                answer = [(compute(), None)]
            except Exception as error:  # raised on all ranks below
                answer = [(None, error)]
        dist.broadcast_object_list(answer, src=0, group=self.host_group)
        value, problem = answer[0]
        if problem is not None:
            raise problem
        return value  # type: ignore[return-value]

    def start_vote(self, *flags: bool) -> "Vote":
        """Start an asynchronous vote: for each flag, whether it is set on any rank."""
        values = torch.tensor(flags, dtype=torch.int64)
        if self.size == 1:
            return Vote(values)
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.host_group, async_op=True)
        return Vote(values, work)

    def barrier(self) -> None:
        """Wait until all ranks have arrived."""
        dist.barrier(group=self.host_group)


@dataclass(frozen=True)
class Vote:
    """An asynchronous vote that `World.start_vote` started."""

    flags: Tensor
    work: dist.Work | None = None
    """None when a single process has decided by itself."""

    def result(self) -> tuple[bool, ...]:
        """Wait for the vote and return one answer per flag, the same on all ranks."""
        if self.work is not None:
            self.work.wait()
        return tuple(bool(flag) for flag in self.flags.tolist())


def choose_device(name: str) -> torch.device:
    """Return the device for a name; `auto` prefers CUDA. Raises DeviceError if CUDA is unavailable."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise DeviceError("device=cuda, but no CUDA device is visible; use device=auto or device=cpu")
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def compute_on_cpu(threads: int) -> None:
    """Prepare this process for work on the CPU with this number of threads."""
    torch.set_num_threads(threads)
    host_memory.reuse()


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix instructions: CUDA capability 8.0 or later, or a CPU with AMX,
    AVX512-BF16 or similar. Without them, torch converts to fp32 and back, 8 to 10 times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # oneDNN respects ONEDNN_MAX_CPU_ISA, but it also reports emulation on AVX512 as support.
    capabilities = torch.cpu.get_capabilities()
    has_instructions = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return has_instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_precision(name: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """Resolve a precision; `auto` is bf16 if the device multiplies it in hardware, else fp32."""
    if name == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    return "bf16" if name == "bf16" else "fp32"


SLOW_BF16 = "this CPU has no bf16 instructions, so bf16 is 8 to 10 times slower than fp32; auto selects fp32"
"""Warning when bf16 is requested and `multiplies_bf16` is false."""


def start(config: EngineConfig) -> World:
    """Join the process group and return it.

    Raises DeviceError if the device is unavailable or the rendezvous port is in use, and ConfigError if the
    launcher's environment variables are incomplete.
    """
    device = choose_device(config.device)
    if device.type == "cpu":
        compute_on_cpu(config.cpu_threads)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"RANK is set, but not {', '.join(missing)}; use the deepspeed launcher, or unset RANK"
            )
        try:
            dist.init_process_group(backend, timeout=_TIMEOUT)
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise DeviceError(
                f"port {os.environ['MASTER_PORT']} is in use (EADDRINUSE), possibly by another run; pass "
                "another one with `deepspeed --master_port NUMBER`, or use `dit-scale launch`, which picks "
                "a free port for every start"
            ) from None
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    host_group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=_TIMEOUT)
    assert host_group is not None
    return World(dist.get_rank(), dist.get_world_size(), device, host_group)


def stop() -> None:
    """Leave the process group, if this process joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()
