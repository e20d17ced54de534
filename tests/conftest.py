"""Settings and fixtures for all tests."""

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:  # pytest-xdist is optional: `-p no:xdist` works
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

    from dit_scale.dist import World

# Hypothesis generates the same examples in every run, and no test fails because a machine was slow.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

# A shell starts background jobs with SIGINT and SIGQUIT ignored, and `nohup` ignores SIGHUP. The processes
# that tests start would inherit this.
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW_FIRST = (
    "tests/elastic/",
    "tests/cluster/",
    "tests/storm/",
    "tests/pipeline/test_encode_kills.py",
    "tests/pipeline/",
    "tests/dist/test_kills.py",
    "tests/dist/",
    "tests/bench/",
    "tests/crash/",
)
"""Slow tests start first, so that the last minutes of a parallel run keep all processes busy."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadScopeScheduling":
    from tests.support.scheduling import FolderScheduling

    return FolderScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)  # a stable sort: the order within a folder stays


def _rank(item: pytest.Item) -> int:
    ranks = (rank for rank, start in enumerate(SLOW_FIRST) if item.nodeid.startswith(start))
    return next(ranks, len(SLOW_FIRST))


@pytest.fixture
def world() -> "Iterator[World]":
    """A world of one process on the CPU."""
    import torch

    from dit_scale import dist
    from dit_scale.config import EngineConfig

    threads = torch.get_num_threads()
    yield dist.start(EngineConfig(device="cpu"))
    dist.stop()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """The environment variables that point boto3 at an S3 server with an empty bucket."""
    from tests.support.s3 import s3_server

    with s3_server() as environment:
        yield environment
