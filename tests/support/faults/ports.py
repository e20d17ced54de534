"""Ports of loopback for servers that need a fixed number."""

import socket
from random import SystemRandom

_PORTS = range(20_000, 32_000)
"""Below the ports that the kernel gives to outgoing connections, which therefore cannot take one of these."""
_draws = SystemRandom()  # unseeded, so that parallel runs draw different ports


def free_port() -> int:
    """Return a port on which nothing listens."""
    while True:
        port = _draws.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
