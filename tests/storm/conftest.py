"""Servers shared by all tests in this folder."""

from collections.abc import Iterator

import pytest

from tests.support.faults.ceph import CephServer, ceph_s3


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephServer]:
    """A real S3 server with an empty bucket."""
    with ceph_s3() as server:
        yield server
