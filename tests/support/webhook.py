"""An HTTP server that receives the messages of a webhook."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "T0KEN-0123456789"
"""The part of the URL that must appear nowhere."""


class Receiver:
    """What the server got, and how it answers."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.status = 200
        self.hangs = threading.Event()
        """Set: no request is answered until the end."""
        self.is_over = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        receiver: Receiver = self.server.receiver  # type: ignore[attr-defined]
        if receiver.hangs.is_set():
            receiver.is_over.wait()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == f"/services/{SECRET}", self.path
        assert self.headers["Content-Type"] == "application/json"
        receiver.messages.append(json.loads(body))
        self.send_response(receiver.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@contextmanager
def receiver() -> Iterator[tuple[str, Receiver]]:
    """Yield the URL of a server, and what it receives."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    received = Receiver()
    server.receiver = received  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/services/{SECRET}", received
    finally:
        received.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()
