"""Find the tensors in what a program saved: under which keys they are, and what it added to their names."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_scale.errors import WeightsError

StateDict = dict[str, Tensor]

EMA = "ema"
KEYS = (EMA, "model", "state_dict", "module")
"""Keys that hold weights, in order of preference: averaged weights first, then the raw ones."""
MODULES = ("module", "_orig_mod")
"""Parts of a name that DataParallel, DistributedDataParallel, DeepSpeed and torch.compile add."""
NUM_AVERAGED = "n_averaged"
"""A counter that torch's AveragedModel saves among the weights."""


@dataclass(frozen=True)
class Unwrapped:
    """Tensors by their published names."""

    tensors: StateDict
    keys: tuple[str, ...]
    """Keys that led to them, outermost first; empty if the file holds nothing else."""


def unwrap(content: object, origin: str) -> Unwrapped:
    """Return the tensors in `content`, which was read from `origin`.

    Follows `KEYS` through nested dicts and removes `MODULES` from names. Raises WeightsError if it finds
    anything else than tensors by name, or two tensors with the same name.
    """
    keys: list[str] = []
    while (key := _inner_key(content)) is not None:
        assert isinstance(content, dict)
        keys.append(key)
        content = content[key]
    where = f"{origin}, under {' / '.join(map(repr, keys))}" if keys else origin
    return Unwrapped(_without_modules(_only_tensors(content, where), where), tuple(keys))


def _inner_key(content: object) -> str | None:
    if not isinstance(content, dict):
        return None
    return next((key for key in KEYS if isinstance(content.get(key), dict) and content[key]), None)


def _only_tensors(content: Any, where: str) -> StateDict:
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{where}: expected tensors by name, got {type(content).__name__}")
    foreign = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise WeightsError(
            f"{where}: expected tensors by name, or a dict with {', '.join(map(repr, KEYS[:-1]))} or "
            f"{KEYS[-1]!r}; got {type(content[foreign[0]]).__name__} under {foreign[0]!r}"
        )
    return dict(content)


def _without_modules(tensors: StateDict, where: str) -> StateDict:
    out: StateDict = {}
    origins: dict[str, str] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in MODULES)
        if short == NUM_AVERAGED:
            continue
        if short in out:
            raise WeightsError(f"{where}: {origins[short]!r} and {name!r} are the same tensor, {short!r}")
        out[short], origins[short] = tensor, name
    return out
