"""Draws as docs/formats.md defines them, in Python's own integers: the reference for `dit_scale.rng`.

Key: (seed, purpose). Counter: (position low, position high, block, stream). Purposes are plain numbers here.
"""

import math

TIMESTEP, NOISE, LABEL_DROP, VIEW, POSTERIOR = range(5)
_LOW = 0xFFFFFFFF


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
