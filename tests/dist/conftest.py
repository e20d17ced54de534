"""What several tests of real ranks share."""

from pathlib import Path

import pytest

from tests.support.latents import write_latents


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=40)
    return folder
