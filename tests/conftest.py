"""Settings of all tests."""

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from dit_scale.dist import World

# The same examples every time, and no test fails because a machine was slow.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

# A shell starts what runs in its background deaf to these keys, as `nohup` does to SIGHUP; so would be every
# process that a test starts.
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

STREAMS = ("tests/elastic/", "tests/cluster/", "tests/storm/")
"""Folders of tests that wait for deadlines, leases and servers most of the time, and start many processes."""

FIRST = (
    *STREAMS,
    "tests/pipeline/test_encode_kills.py",
    "tests/pipeline/",
    "tests/dist/test_kills.py",
    "tests/dist/",
    "tests/bench/",
    "tests/crash/",
)
"""What takes long begins early, so that no process is left alone with it at the end."""


class Streams(LoadScopeScheduling):
    """With `-n 3`, tests of a folder of STREAMS run one after the other, and files of others beside them."""

    def _split_scope(self, nodeid: str) -> str:
        files = nodeid.partition("::")[0]
        return next((folder for folder in STREAMS if nodeid.startswith(folder)), files)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Streams:
    return Streams(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)  # stable: within a folder the order stays


def _rank(item: pytest.Item) -> int:
    ranks = (rank for rank, start in enumerate(FIRST) if item.nodeid.startswith(start))
    return next(ranks, len(FIRST))


@pytest.fixture
def world() -> "Iterator[World]":
    """A world of one process, on the CPU."""
    import torch

    from dit_scale import dist
    from dit_scale.config import EngineConfig

    threads = torch.get_num_threads()
    yield dist.start(EngineConfig(device="cpu"))
    dist.stop()
    torch.set_num_threads(threads)
