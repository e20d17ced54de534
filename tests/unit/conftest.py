"""What tests of commands need that run in their own process."""

import signal
from collections.abc import Iterator

import pytest
import torch

from dit_scale import signals


@pytest.fixture
def same_process() -> Iterator[None]:
    """Commands run in this process here: put back what they set for their own."""
    handlers = {number: signal.getsignal(number) for number in signals.ALL}
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        environment.setenv("NCCL_ALGO", "Ring")
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark
    assert not torch.distributed.is_initialized()
