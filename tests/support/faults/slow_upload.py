"""A forwarder to a port of loopback, reachable from other hosts, whose uploads can be slowed down."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK_BYTES = 8 * 1024
_BUFFER_BYTES = 64 * 1024
"""Kernel buffer size. With a larger one, a body would seem sent long before it is."""


class Way:
    """The address of the forwarder, and its speed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.bytes_per_s = float("inf")
        """Speed of each connection, towards the server."""


@contextmanager
def slow_upload(upstream_port: int) -> Iterator[Way]:
    """Open the forwarder; it runs at full speed until `bytes_per_s` is set."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", upstream_port)) as upstream:
                back = threading.Thread(target=_copy, args=(upstream, self.request, None), daemon=True)
                back.start()
                _copy(self.request, upstream, way)
                back.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, allow_reuse_address = True, False, True

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            super().server_bind()

    with Server(("0.0.0.0", 0), Handler) as server:
        way = Way(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield way
        finally:
            server.shutdown()
            thread.join()


def _copy(source: socket.socket, target: socket.socket, way: Way | None) -> None:
    """Copy until the source ends, then tell the target."""
    try:
        while data := source.recv(_CHUNK_BYTES):
            target.sendall(data)
            if way is not None:
                time.sleep(len(data) / way.bytes_per_s)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # one side has disconnected, and the other must see it
        for side in (source, target):
            side.close()
