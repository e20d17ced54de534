"""Which timesteps a respaced diffusion keeps.

    select(alphas_cumprod_T, "250")                        # uniform: as published for DiT
    select(alphas_cumprod_T, "20", spacing="logsnr")

Every spacing keeps the first index (the least noise) and, except for strides such as "ddim50", the last.

Shapes: T timesteps, S timesteps that are kept.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, repeat

import numpy as np
import numpy.typing as npt

from dit_scale.choices import SPACINGS
from dit_scale.errors import ConfigError

Float64 = npt.NDArray[np.float64]


def select(alphas_cumprod_T: Float64, spec: str, spacing: str = "uniform") -> list[int]:
    """Return the indices, ascending, that a respacing keeps of a schedule with this alpha_bar.

    "uniform"    see `kept_indices`, which also defines the specifications
    "quadratic"  denser towards low noise: index i is floor(c i^2) (Song et al. 2021, appendix D.3)
    "logsnr"     evenly spaced in log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)) (Lu et al. 2022a, section 3.4)

    The last two take a number of steps only. Indices that coincide move apart by the least amount. Raises
    ConfigError for an unknown spacing, and for a specification that cannot be parsed or satisfied.
    """
    num_timesteps = len(alphas_cumprod_T)
    if spacing not in SPACINGS:
        raise ConfigError(f"spacing {spacing!r}: expected one of {', '.join(SPACINGS)}")
    if spacing == "uniform":
        return kept_indices(num_timesteps, spec)
    if not (spec.isdecimal() and 2 <= int(spec) <= num_timesteps):
        raise ConfigError(
            f"respacing {spec!r} with {spacing} spacing: expected a number of steps between 2 and "
            f"{num_timesteps}; sections and strides ('10,15,20', 'ddim50') are for uniform spacing"
        )
    if spacing == "quadratic":
        return _distinct(_quadratic(num_timesteps, int(spec)), num_timesteps)
    return _distinct(_even_in_logsnr(alphas_cumprod_T, int(spec)), num_timesteps)


def kept_indices(num_timesteps: int, spec: str) -> list[int]:
    """Return the indices, ascending, that a uniform respacing keeps of `num_timesteps`.

    "250"       250 indices, evenly spaced from the first to the last, rounded
    "10,15,20"  three sections of equal length (the first ones take the remainder) with 10, 15 and 20
                evenly spaced indices
    "ddim50"    every n-th index from 0; n is the smallest stride that gives 50 (Song et al. 2021)

    Raises ConfigError for a specification that cannot be parsed or satisfied.
    """
    if spec.startswith("ddim"):
        return _strided(num_timesteps, _count(spec.removeprefix("ddim"), spec))
    counts = [_count(part, spec) for part in spec.split(",")]
    if sum(counts) < 2:
        raise ConfigError(f"respacing {spec!r}: expected 2 or more steps in total")
    shortest, num_longer = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = shortest + (section < num_longer)
        if count > size:
            raise ConfigError(
                f"respacing {spec!r}: section {section + 1} of {len(counts)} has {size} of the "
                f"{num_timesteps} timesteps; expected at most {size} steps, got {count}"
            )
        kept += [start + offset for offset in _spread(size, count)]
        start += size
    return kept


def _quadratic(num_timesteps: int, count: int) -> list[int]:
    # Song et al. 2021, appendix D.3, with c such that the last index is num_timesteps - 1. Integers, so
    # that the floor is exact.
    return [(num_timesteps - 1) * i**2 // (count - 1) ** 2 for i in range(count)]


def _even_in_logsnr(alphas_cumprod_T: Float64, count: int) -> list[int]:
    """Return the index whose half log SNR is nearest to each of `count` evenly spaced values."""
    rising_T = -0.5 * np.log(alphas_cumprod_T / (1 - alphas_cumprod_T))
    wanted_S = np.linspace(rising_T[0], rising_T[-1], count)
    above_S = np.searchsorted(rising_T, wanted_S).clip(1, len(rising_T) - 1)
    below_is_nearer_S = wanted_S - rising_T[above_S - 1] <= rising_T[above_S] - wanted_S
    nearest: list[int] = (above_S - below_is_nearer_S).tolist()
    return nearest


def _distinct(indices: Sequence[int], num_timesteps: int) -> list[int]:
    """Raise ascending indices until no two are equal, and stay below `num_timesteps`."""
    raised = accumulate(indices, lambda previous, index: max(index, previous + 1))
    first_limit = num_timesteps - len(indices)
    return [min(index, first_limit + i) for i, index in enumerate(raised)]


def _spread(size: int, count: int) -> Iterator[int]:
    """Return `count` evenly spaced integers from 0 to `size` - 1; a single one is 0.

    The stride accumulates in float64 and halves round to even, as in the reference code: other arithmetic
    would select other steps.
    """
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    return map(round, accumulate(repeat(stride, count - 1), initial=0.0))


def _strided(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return list(kept)
    raise ConfigError(
        f"respacing 'ddim{count}': no integer stride over {num_timesteps} timesteps gives {count} steps; "
        f"use a divisor of {num_timesteps}, or {str(count)!r} for uneven strides"
    )


def _count(text: str, spec: str) -> int:
    if not (text.strip().isdecimal() and int(text) > 0):
        raise ConfigError(
            f"respacing {spec!r}: expected a number of steps ('250'), one number per section "
            f"('10,15,20') or a DDIM stride ('ddim50'), got {text!r}"
        )
    return int(text)
