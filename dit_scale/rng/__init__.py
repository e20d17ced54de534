"""Stateless random draws, keyed by position: Philox4x32-10, computed on the device.

Every draw of training and sampling is a pure function of (seed, purpose, position): the Philox key is
(seed, purpose) and the counter is (position, block, stream). A draw therefore does not depend on the rank,
the world size, the micro-batch or earlier draws, and a checkpoint needs no random state.

Integers and uniforms are exact on every device. Normals are computed in float64 and rounded once to fp32, so
two devices differ by at most one fp32 ulp, where their float64 math differs.

A draw is one operator of torch, which torch.compile leaves as it is. `plain` defines it, `cpu` computes the
same bits in less time, and on CUDA it is one launch of a kernel in `dit_scale/kernels/philox.py`. Without
Triton, CUDA executes the plain version; `backend` says which.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

Shapes: N positions, W words per position.
"""

import enum
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dit_scale import kernels
from dit_scale.rng import cpu, plain


class Purpose(enum.IntEnum):
    """What a draw is for: the second key word. The numbers are part of the file format; never reuse one."""

    TIMESTEP = 0
    NOISE = 1
    LABEL_DROP = 2
    VIEW = 3
    POSTERIOR = 4
    SAMPLE_START = 5
    SAMPLE_STEP = 6
    HELD_OUT_TIMESTEP = 7
    HELD_OUT_NOISE = 8
    HELD_OUT_POSTERIOR = 9
    SAMPLE_LABEL = 10


def words(seed: int, purpose: Purpose, position_N: Tensor, num_words: int, stream: int = 0) -> Tensor:
    """Return the first `num_words` 32-bit words of each position => (N, W) int64, by the plain version.

    The counter is (position low, position high, block, stream). `stream` separates draws with the same
    purpose and position, such as the steps of a sampler.
    """
    return plain.words(position_N.to(torch.int64), seed, int(purpose), num_words, stream)


def integers(seed: int, purpose: Purpose, position_N: Tensor, high: int) -> Tensor:
    """Draw one integer in [0, high) per position => (N,) int64: floor(word * high / 2^32)."""
    drawn: Tensor = torch.ops.dit_scale.integers(_key(position_N), seed, int(purpose), high)
    return drawn


def uniforms(seed: int, purpose: Purpose, position_N: Tensor) -> Tensor:
    """Draw one number in [0, 1) per position => (N,) float64: word / 2^32, exactly."""
    drawn: Tensor = torch.ops.dit_scale.uniforms(_key(position_N), seed, int(purpose))
    return drawn


def normals(
    seed: int, purpose: Purpose, position_N: Tensor, shape: tuple[int, ...], stream: int = 0
) -> Tensor:
    """Draw standard normals => (N, *shape) fp32, with the Box-Muller transform of consecutive word pairs."""
    count = math.prod(shape)
    drawn: Tensor = torch.ops.dit_scale.normals(_key(position_N), seed, int(purpose), count, stream)
    return drawn.reshape(-1, *shape)


def _key(position_N: Tensor) -> Tensor:
    return position_N.to(torch.int64).contiguous()


def backend(device: torch.device) -> str:
    """Describe what computes the draws on a device."""
    if device.type != "cuda":
        return "numpy" if device.type == "cpu" else "torch"
    lack = kernels.missing()
    return f"torch ({lack})" if lack else "triton"


_OPERATORS = torch.library.Library("dit_scale", "DEF")


def _register(schema: str, shape: Callable[..., Tensor]) -> None:
    """Define the operator of a draw; `shape` returns an uninitialised tensor like its result."""
    name = schema.partition("(")[0]
    _OPERATORS.define(schema)
    _OPERATORS.impl(name, getattr(plain, name), "CompositeExplicitAutograd")
    _OPERATORS.impl(name, getattr(cpu, name), "CPU")
    torch.library.register_fake(f"dit_scale::{name}", shape, lib=_OPERATORS)
    if kernels.missing():
        return

    def launch(*args: Tensor | int) -> Tensor:
        from dit_scale.kernels import philox

        drawn: Tensor = getattr(philox, name)(*args)
        return drawn

    _OPERATORS.impl(name, launch, "CUDA")


_register(
    "integers(Tensor position_N, int seed, int purpose, int high) -> Tensor",
    lambda position_N, *_: torch.empty_like(position_N),
)
_register(
    "uniforms(Tensor position_N, int seed, int purpose) -> Tensor",
    lambda position_N, *_: torch.empty_like(position_N, dtype=torch.float64),
)
_register(
    "normals(Tensor position_N, int seed, int purpose, int count, int stream) -> Tensor",
    lambda position_N, *numbers: position_N.new_empty((len(position_N), numbers[2]), dtype=torch.float32),
)
