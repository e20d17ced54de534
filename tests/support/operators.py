"""Count what reaches the kernels and the network: operators, and collectives with their bytes.

with counted() as found:
    trainer.take(batches, step)
found.operators["aten.copy_.default"], found.collectives["allreduce_"]
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The argument with all of the data: the sum, the parts gathered, what is scattered.
_DATA = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1, "allgather_": 0, "broadcast_": 0}


class Counts(TorchDispatchMode):
    """Operators by name, and calls and bytes of collectives by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func._opname
            self.collectives[kind] += 1
            self.bytes[kind] += sum(tensor.nbytes for tensor in _tensors(args[_DATA[kind]]))
        else:
            self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counts]:
    """Count inside the context."""
    with Counts() as counts:
        yield counts


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    else:
        for item in argument:
            yield from _tensors(item)
