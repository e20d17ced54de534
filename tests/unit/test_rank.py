"""How a rank records its end, and how it checks that it can reach rank 0."""

import json
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from dit_scale.elastic.node.exits import Exit, Verdict, exit_code, read_verdict, write_verdict
from dit_scale.elastic.node.rank import is_second_hand, reach
from dit_scale.errors import (
    ConfigError,
    DataError,
    DeviceError,
    DitScaleError,
    StabilityError,
    StorageError,
    WeightsError,
)


class DistNetworkError(RuntimeError):
    """Named like that of torch."""


@pytest.mark.parametrize(
    ("error", "second_hand"),
    [
        (
            RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1957."),
            True,
        ),
        (DistNetworkError("The client socket has timed out after 600000ms while trying to connect"), True),
        (DistNetworkError("failed to listen on any local network address. port: 1, EADDRINUSE"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (DataError("shard 00000, sample 9: expected CRC-32C 8240f72c"), False),
    ],
)
def test_an_error_that_another_rank_caused_is_second_hand(error: Exception, second_hand: bool) -> None:
    assert is_second_hand(error) == second_hand


def test_only_permanent_errors_forbid_a_restart() -> None:
    permanent = (StabilityError(""), ConfigError(""), WeightsError(""))
    transient = (DataError(""), StorageError(""), DeviceError(""), RuntimeError(""))
    assert {exit_code(error) for error in permanent} == {Exit.DO_NOT_RESTART}
    assert {exit_code(error) for error in transient} == {Exit.FAILED}


def test_the_node_of_rank_0_may_respond_before_its_rank_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reach("127.0.0.1", port, within_s=1)
    reach("127.0.0.1", port, within_s=1)


def test_a_node_of_rank_0_that_does_not_respond_is_named() -> None:
    with socket.socket() as server, ExitStack() as clients:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = server.getsockname()[1]
        clients.enter_context(
            socket.create_connection(("127.0.0.1", port))
        )  # it drops all further connections
        with pytest.raises(DitScaleError, match=rf"127\.0\.0\.1:{port} within 1 s: timed out; expected"):
            reach("127.0.0.1", port, within_s=1)
    with pytest.raises(DitScaleError, match=r"no-such-node\.invalid:1 within 0 s: "):
        reach("no-such-node.invalid", 1, within_s=0)


def test_a_verdict_is_read_as_it_was_written_under_the_keys_of_its_file(tmp_path: Path) -> None:
    verdict = Verdict(rank=3, code=1, step=7, error="RuntimeError", message="it broke", phase="COMPUTE")
    write_verdict(tmp_path, verdict)
    assert read_verdict(tmp_path, 3) == verdict
    assert read_verdict(tmp_path, 4) is None
    keys = set(json.loads((tmp_path / "verdict-00003.json").read_text()))
    assert keys == {"rank", "code", "step", "error", "message", "section", "second_hand"}
