"""Settings of all tests."""

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# The same examples every time, and no test fails because a machine was slow.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

NODES = ("tests/chaos/", "tests/cluster/", "tests/elastic/", "tests/storm/")
"""Tests that wait for deadlines, leases and servers most of the time."""


class Streams(LoadScopeScheduling):
    """With `-n 2` those of NODES run one after the other, and all others, by files, beside them."""

    def _split_scope(self, nodeid: str) -> str:
        return "nodes" if nodeid.startswith(NODES) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Streams:
    return Streams(config, log)
