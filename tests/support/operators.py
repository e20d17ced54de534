"""Counting torch's operators: on a GPU, each that is not a view is at least one launch of a kernel.

with Operators() as seen:
    compute()
assert seen.kernels() == 3
"""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Records the operators that are called inside its context, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the operator and execute it."""
        kind = self.views if func.is_view or func.name() in VIEWS else self.called
        kind[func.name()] += 1
        return func(*args, **(kwargs or {}))

    def kernels(self) -> int:
        """Number of calls that launch kernels."""
        return self.called.total()


VIEWS = (
    "aten::_unsafe_view",
    "aten::detach",
    "aten::empty.memory_format",
    "aten::new_empty",
    "aten::empty_like",
)
"""Operators without a kernel that torch does not list as views."""
