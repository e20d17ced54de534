"""Fixtures shared by the unit tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dit_scale import signals
from dit_scale.elastic.board import Board
from dit_scale.storage import Storage, open_storage
from tests.support.tiny_vae import save_tiny_vae


@pytest.fixture
def root(tmp_path: Path) -> Storage:
    """Storage in an empty folder."""
    return open_storage(tmp_path)


@pytest.fixture
def board(root: Storage) -> Board:
    """An empty board."""
    return Board(root)


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small autoencoder with random weights."""
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def same_process() -> Iterator[None]:
    """Restore the process-wide settings that a command changes when a test runs it in this process."""
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
