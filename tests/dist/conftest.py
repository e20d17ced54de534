"""Fixtures shared by the tests that start real ranks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faults.small_disk import small_disk
from tests.support.latents import write_latents


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 40 latents."""
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=40)
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 200 MiB, which a test can fill."""
    with small_disk(tmp_path / "disk", 200 * 2**20) as folder:
        yield folder
