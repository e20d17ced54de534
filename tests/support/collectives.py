"""Counting collectives and their bytes.

with Collectives() as seen:
    trainer.take(batches, step)
assert seen.calls == {"allreduce_": 3} and seen.bytes["allreduce_"] == 4 * num_parameters
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_DATA = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1}
"""Collective => the argument with the complete data: what is summed, gathered or scattered."""


class Collectives(TorchDispatchMode):
    """Records the collectives on tensors that are called inside its context, by torch's name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the collective and execute it."""
        if func.namespace == "c10d":
            name = func._opname
            self.calls[name] += 1
            self.bytes[name] += sum(tensor.nbytes for tensor in _tensors(args[_DATA[name]]))
        return func(*args, **(kwargs or {}))


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    else:
        for item in argument:
            yield from _tensors(item)
