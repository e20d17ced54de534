"""Settings of all tests."""

import signal

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

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
