"""Fixtures shared by the tests on SLURM."""

from collections.abc import Iterator

import pytest

from tests.support.cluster.slurm import Slurm, slurm_cluster


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A real SLURM cluster of two nodes."""
    with slurm_cluster(nodes=2) as running:
        yield running
