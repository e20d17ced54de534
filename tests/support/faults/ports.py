"""Ports of loopback for servers that must be told a number."""

import socket
from random import SystemRandom

_PORTS = range(20_000, 32_000)
"""Below those that the kernel gives to outgoing connections: none takes one before its server listens."""
_draws = SystemRandom()  # whatever seeds the other generators, runs side by side draw different ones


def free_port() -> int:
    """A port that nobody listens on."""
    while True:
        port = _draws.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
