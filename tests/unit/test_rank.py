"""What a rank says of its own end."""

import pytest

from dit_scale.elastic.exits import Exit
from dit_scale.elastic.rank import exit_code, is_second_hand
from dit_scale.errors import ConfigError, DataError, StabilityError


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


def test_errors_that_a_person_must_mend_are_told_from_those_that_may_pass() -> None:
    errors = (StabilityError(""), ConfigError(""), DataError(""), RuntimeError(""))
    assert [exit_code(error) for error in errors] == [
        Exit.DO_NOT_RESTART,
        Exit.MISTAKE,
        Exit.FAILED,
        Exit.FAILED,
    ]
