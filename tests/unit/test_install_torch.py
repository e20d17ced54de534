"""On a machine without a GPU, set-up installs torch's CPU build if its index is reachable."""

import os
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.faults.ports import free_port

SCRIPT = Path(__file__).parents[2] / "demo" / "install_torch.sh"

pytestmark = pytest.mark.skipif(
    any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))),
    reason="needs a machine without an NVIDIA GPU",
)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """Serve a package index with a page for torch."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "index.html").write_text("<!DOCTYPE html><title>torch</title>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def asked_of_pip(index: str) -> str:
    """Return the script's output, then the arguments of pip, which `echo` replaces."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "echo"],
        env={**os.environ, "TORCH_CPU_INDEX": index, "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_cpu_build_if_its_index_answers(index: str) -> None:
    said, arguments = asked_of_pip(index).splitlines()
    assert "torch for the CPU" in said
    assert arguments == f"install --quiet --extra-index-url {index} torch"


def test_pips_default_if_it_does_not() -> None:
    said, arguments = asked_of_pip(f"http://127.0.0.1:{free_port()}").splitlines()
    assert "cannot be reached" in said
    assert arguments == "install --quiet torch"
