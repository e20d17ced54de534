"""The draws of `dit_scale.rng`, one launch each: from positions to the final numbers.

`dit_scale.rng` defines them. Integers and uniforms equal those of its plain version, and normals agree to one
ulp of fp32.

Shapes: N positions.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

POSITIONS, COUNTERS = 256, 128
"""Sizes of a program: positions of integers and uniforms, counters (of four words) of normals."""
TO_UNIT = tl.constexpr(2.0**-32)
TO_RADIANS = tl.constexpr(2.0 * math.pi * 2.0**-32)
QUARTER = tl.constexpr(2**30)
_VARIABLE = ["seed", "purpose", "stream", "high"]
"""Arguments whose values get no kernel of their own; Triton compiles one for 1 and for multiples of 16."""


@triton.jit
def first_words(position_ptr, num, seed, purpose, SIZE: tl.constexpr):
    """Word 0 of each of a program's positions => words uint32, their offsets, whether they exist."""
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    exists = offset < num
    position = tl.load(position_ptr + offset, mask=exists, other=0)
    zero = tl.zeros([SIZE], tl.uint32)
    word, _, _, _ = tl.philox_impl(
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        zero,
        zero,
        seed.to(tl.uint32),
        purpose.to(tl.uint32),
    )
    return word, offset, exists


@triton.jit(do_not_specialize=_VARIABLE)
def integers_kernel(position_ptr, out_ptr, num, seed, purpose, high, SIZE: tl.constexpr):
    """floor(word 0 * high / 2^32) of each position, int64."""
    word, offset, exists = first_words(position_ptr, num, seed, purpose, SIZE)
    tl.store(out_ptr + offset, (word.to(tl.int64) * high) >> 32, mask=exists)


@triton.jit(do_not_specialize=_VARIABLE)
def uniforms_kernel(position_ptr, out_ptr, num, seed, purpose, SIZE: tl.constexpr):
    """Word 0 of each position / 2^32, float64."""
    word, offset, exists = first_words(position_ptr, num, seed, purpose, SIZE)
    tl.store(out_ptr + offset, word.to(tl.float64) * TO_UNIT, mask=exists)


@triton.jit
def box_muller(first, second):
    """Two normals, fp32, of two words: computed in float64."""
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 0.5) * TO_UNIT))
    # The angle is the nearest multiple of a quarter turn plus a rest in +-pi/4, exactly, because words are
    # integers. Up to pi/4, eight terms of Taylor's series are exact to half an ulp of float64. The library's
    # sine and cosine would also reduce huge angles, which takes local memory.
    quarters = (second + QUARTER // 2) // QUARTER
    rest = (second - quarters * QUARTER).to(tl.int32, bitcast=True).to(tl.float64) * TO_RADIANS
    square = rest * rest
    cosine = tl.full(rest.shape, 1.0, tl.float64)
    sine = tl.full(rest.shape, 1.0, tl.float64)
    for term in tl.static_range(8, 0, -1):
        cosine = 1.0 - square * cosine * (1 / (2 * term * (2 * term - 1)))
        sine = 1.0 - square * sine * (1 / (2 * term * (2 * term + 1)))
    sine *= rest
    turned = quarters % 2 == 1
    even = radius * tl.where(turned, sine, cosine)
    odd = radius * tl.where(turned, cosine, sine)
    even = tl.where((quarters + 1) // 2 % 2 == 1, -even, even)
    odd = tl.where(quarters // 2 % 2 == 1, -odd, odd)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit(do_not_specialize=_VARIABLE)
def normals_kernel(position_ptr, out_ptr, count, seed, purpose, stream, SIZE: tl.constexpr):
    """Row n of out, of `count` normals: a program per position and SIZE counters."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row)
    block = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    zero = tl.zeros([SIZE], tl.uint32)
    word0, word1, word2, word3 = tl.philox_impl(
        zero + position.to(tl.uint32),
        zero + (position >> 32).to(tl.uint32),
        block.to(tl.uint32),
        zero + stream.to(tl.uint32),
        seed.to(tl.uint32),
        purpose.to(tl.uint32),
    )
    normal0, normal1 = box_muller(word0, word1)
    normal2, normal3 = box_muller(word2, word3)
    # Interleaved, so that a thread stores its four neighbours at once.
    normal = tl.join(tl.join(normal0, normal2), tl.join(normal1, normal3)).reshape([4 * SIZE])
    element = tl.program_id(1) * 4 * SIZE + tl.arange(0, 4 * SIZE)
    tl.store(out_ptr + row * count + element, normal, mask=element < count)


def integers(position_N: Tensor, seed: int, purpose: int, high: int) -> Tensor:
    """See `dit_scale.rng.integers`."""
    out_N = torch.empty_like(position_N)
    grid = (triton.cdiv(len(position_N), POSITIONS),)
    with torch.cuda.device_of(position_N):
        integers_kernel[grid](position_N, out_N, len(position_N), seed, purpose, high, SIZE=POSITIONS)
    return out_N


def uniforms(position_N: Tensor, seed: int, purpose: int) -> Tensor:
    """See `dit_scale.rng.uniforms`."""
    out_N = torch.empty_like(position_N, dtype=torch.float64)
    grid = (triton.cdiv(len(position_N), POSITIONS),)
    with torch.cuda.device_of(position_N):
        uniforms_kernel[grid](position_N, out_N, len(position_N), seed, purpose, SIZE=POSITIONS)
    return out_N


def normals(position_N: Tensor, seed: int, purpose: int, count: int, stream: int) -> Tensor:
    """See `dit_scale.rng.normals` => (N, count)."""
    out_NW = position_N.new_empty((len(position_N), count), dtype=torch.float32)
    grid = (len(position_N), triton.cdiv(count, 4 * COUNTERS))
    with torch.cuda.device_of(position_N):
        normals_kernel[grid](position_N, out_NW, count, seed, purpose, stream, SIZE=COUNTERS)
    return out_NW
