"""Draws as docs/formats.md defines them, in Python's own integers: the reference for `dit_scale.rng`.

Key: (seed, purpose). Counter: (position low, position high, block, stream). Purposes are plain numbers here.
"""

import math
from typing import NamedTuple

TIMESTEP, NOISE, LABEL_DROP, VIEW, POSTERIOR = range(5)
_LOW = 0xFFFFFFFF


class Vector(NamedTuple):
    """A published test vector of Philox4x32-10."""

    counter: tuple[int, ...]
    key: tuple[int, ...]
    words: tuple[int, ...]


VECTORS = tuple(
    Vector(*(tuple(int(word, 16) for word in text.split()) for text in texts))
    for texts in (
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    )
)


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Four words of 32 bits. Figure 2 of Salmon et al. 2011."""
    k0, k1 = key
    left0, right0, left1, right1 = counter
    for _ in range(10):
        product0, product1 = 0xD2511F53 * left0, 0xCD9E8D57 * left1
        left0, right0 = (product1 >> 32) ^ right0 ^ k0, product1 & _LOW
        left1, right1 = (product0 >> 32) ^ right1 ^ k1, product0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return left0, right0, left1, right1


def words(seed: int, purpose: int, position: int, num_words: int, stream: int = 0) -> list[int]:
    """Return the first words of a position's stream."""
    found: list[int] = []
    for block in range(-(-num_words // 4)):
        found += philox((position & _LOW, position >> 32, block, stream), (seed, purpose))
    return found[:num_words]


def uniform(seed: int, purpose: int, position: int) -> float:
    """Return a number in [0, 1)."""
    return words(seed, purpose, position, 1)[0] / 2**32


def normals(seed: int, purpose: int, position: int, count: int) -> list[float]:
    """Return standard normals by Box-Muller, cosine before sine; `count` is even."""
    drawn = words(seed, purpose, position, count)
    found: list[float] = []
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
        angle = 2 * math.pi * second / 2**32
        found += radius * math.cos(angle), radius * math.sin(angle)
    return found
