"""Where the ranks of a run meet: an address of this node, and a port."""

import socket

from dit_scale.errors import ConfigError, DitScaleError


def check_address(address: str) -> None:
    """Raises ConfigError when ranks of other nodes could not meet at it: it is not one of this machine.

    Of a name that nobody knows it raises DitScaleError: the name server may know it at the next start.
    """
    expected = (
        "expected a name or number of this machine, at which the ranks of the other nodes can reach those of "
        "this one"
    )
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(where)
    except socket.gaierror as error:
        raise DitScaleError(f"--address {address}: {error.strerror}; {expected}") from None
    except OSError as error:
        raise ConfigError(f"--address {address}: {error.strerror}; {expected}") from None


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
