"""Kernels that store what parts of `dit_scale.kernels.philox` compute; importing this imports triton."""

import numpy as np
import torch
import triton
import triton.language as tl

from dit_scale.kernels.philox import box_muller


@triton.jit
def _words(out_ptr, c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    zero = tl.zeros([1], tl.uint32)
    found = tl.philox_impl(
        zero + c0.to(tl.uint32),
        zero + c1.to(tl.uint32),
        zero + c2.to(tl.uint32),
        zero + c3.to(tl.uint32),
        k0.to(tl.uint32),
        k1.to(tl.uint32),
    )
    for i in tl.static_range(4):
        tl.store(out_ptr + i + tl.arange(0, 1), found[i].to(tl.int64))


@triton.jit
def _transform(first_ptr, second_ptr, out_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.arange(0, SIZE)
    even, odd = box_muller(tl.load(first_ptr + offset), tl.load(second_ptr + offset))
    tl.store(out_ptr + offset, even)
    tl.store(out_ptr + SIZE + offset, odd)


def words(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Return the words of a counter, from the generator that the kernels call."""
    out = torch.zeros(4, dtype=torch.int64)
    _words[(1,)](out, *counter, *key)
    return out.tolist()


def transformed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Apply the kernels' Box-Muller transform to words => even elements, odd elements."""
    out = torch.empty(2, len(first))
    pair = (torch.from_numpy(word.astype(np.uint32)) for word in (first, second))
    _transform[(1,)](*pair, out, SIZE=len(first))
    return out.numpy()
