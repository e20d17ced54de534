"""The rendezvous of the ranks: an address of this node, and a free port."""

import socket

from dit_scale.errors import ConfigError, DitScaleError


def check_address(address: str) -> None:
    """Check that an address belongs to this machine, so that ranks of other nodes can meet at it.

    Raises ConfigError if it does not. Raises DitScaleError for a name that cannot be resolved: the name
    server may resolve it at the next start.
    """
    expected = "expected a name or IP address of this machine that the other nodes can reach"
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(where)
    except socket.gaierror as error:
        raise DitScaleError(f"--address {address}: {error.strerror}; {expected}") from None
    except OSError as error:
        raise ConfigError(f"--address {address}: {error.strerror}; {expected}") from None


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
