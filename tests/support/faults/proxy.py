"""A loopback HTTP proxy that injects faults; a seeded random draw decides for each request.

    with FaultProxy(upstream_port, seed=0, rates={"error": 0.1, "short": 0.05}) as proxy:
        ...                      # talk to 127.0.0.1:proxy.port
        proxy.calm()
        assert proxy.injected["short"] > 0

Requests and answers are forwarded unchanged (a signature that covers the Host header stays valid), except
`Expect: 100-continue`, which no signature covers: the proxy answers it. Bodies are held in memory.
"""

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

KINDS = {
    "error": "answer one of `errors`, forward nothing",
    "late_error": "forward the request, answer one of `errors` in place of the server",
    "drop_reply": "forward the request, then reset the connection",
    "reset": "reset the connection, forward nothing",
    "cut_request": "forward a part of the request's body, then reset both connections",
    "cut_reply": "answer with a part of the body, then reset the connection",
    "short": "answer with a part of the body, then close the connection in good order",
    "stall_request": "take a part of the request's body and no more",
    "stall_reply": "answer with a part of the body and no more",
    "trickle": "answer with a byte of the body every 50 ms",
    "flip": "answer with one byte of the body changed, if it is not XML",
}
"""What may happen to a request. A request without such a body meets no fault, and none is counted."""

_RESET = struct.pack("ii", 1, 0)
_HEAD_BYTES = 64 * 1024


@dataclass
class _Message:
    """A request or an answer: its head up to the empty line, and its body as sent."""

    head: bytes
    body: bytes = b""

    @property
    def first_line(self) -> str:
        return self.head.partition(b"\r\n")[0].decode()

    @property
    def is_head(self) -> bool:
        """Whether this is a request whose answer has no body."""
        return self.first_line.startswith("HEAD ")

    def header(self, name: str) -> str:
        found = _line(name).search(self.head)
        return found[1].decode() if found else ""

    def take_header(self, name: str) -> str:
        """Remove a header and return it."""
        value = self.header(name)
        self.head = _line(name).sub(b"", self.head)
        return value


def _line(name: str) -> re.Pattern[bytes]:
    return re.compile(rb"(?im)^" + name.encode() + rb":[ \t]*(.*?)\r\n")


class _ResetError(Exception):
    """The client's connection must be reset."""


class FaultProxy:
    """A context in which the proxy runs in its own thread.

    `rates`: kind => share of the requests that meet it; `seed`: seed of the draws. `requests` counts all
    requests, `injected` those that met a fault, by kind.
    """

    def __init__(self, upstream_port: int, seed: int = 0, rates: Mapping[str, float] | None = None) -> None:
        self.upstream_port = upstream_port
        self.requests = 0
        self.injected: Counter[str] = Counter()
        self.port = 0
        self.stall_s = 60.0
        """How long a connection that stalls or trickles is held; longer than the client's timeout."""
        self.errors = [("500 Internal Server Error", "InternalError"), ("503 Slow Down", "SlowDown")]
        """Status and code of the injected errors."""
        self._draws = random.Random(seed)
        self._set(rates or {}, "", None)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        self._wait(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def set(self, rates: Mapping[str, float], only: str = "", at_most: int | None = None) -> None:
        """Forward again, with these faults from now on.

        `only`: regular expression to search in the request line ("PUT /bucket/key?x=y HTTP/1.1"); `at_most`:
        number of faults before the proxy is calm again.
        """
        self._set(rates, only, at_most)
        self._wait(self._listen())

    def calm(self) -> None:
        """Forward everything unchanged."""
        self.set({})

    def down(self) -> None:
        """Refuse connections, and reset the open ones."""
        self._wait(self._close())

    def blackhole(self) -> None:
        """Accept everything and answer nothing; hanging connections are reset when the mode changes."""
        self._hole = True

    def _set(self, rates: Mapping[str, float], only: str, at_most: int | None) -> None:
        assert set(rates) <= set(KINDS), set(rates) - set(KINDS)
        assert sum(rates.values()) <= 1
        self._rates, self._only, self._left, self._hole = dict(rates), re.compile(only), at_most, False

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=_HEAD_BYTES)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._exchange(reader, writer):
                await writer.drain()
            writer.close()
        except (OSError, EOFError, _ResetError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._tasks.discard(task)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Handle one request and its answer; return whether the connection can take another request."""
        request = _Message(await reader.readuntil(b"\r\n\r\n"))
        await self._pass_the_hole()
        kind = self._draw(request)
        waits = request.take_header("Expect") != ""
        if kind == "reset":
            raise _ResetError
        if kind == "error" and waits:
            return self._send(writer, self._error(request))
        if waits:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = int(request.header("Content-Length") or 0)
        if kind in ("cut_request", "stall_request"):
            request.body = await reader.readexactly(self._draws.randrange(1, size))
            await (self._cut(request) if kind == "cut_request" else asyncio.sleep(self.stall_s))
            raise _ResetError
        request.body = await reader.readexactly(size)
        if kind == "error":
            return self._send(writer, self._error(request))
        answer = await self._forward(request)
        await self._pass_the_hole()
        if kind == "drop_reply":
            raise _ResetError
        if kind == "late_error":
            return self._send(writer, self._error(request))
        if kind and _suits(kind, answer):
            return await self._spoil(kind, answer, reader, writer)
        if kind:
            self._count(kind, -1)
        return self._send(writer, answer)

    async def _spoil(
        self, kind: str, answer: _Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Send an answer whose body is damaged."""
        cut = self._draws.randrange(len(answer.body))
        if kind == "flip":
            body = bytearray(answer.body)
            body[cut] ^= 1 << self._draws.randrange(8)
            return self._send(writer, _Message(answer.head, bytes(body)))
        writer.write(answer.head + (answer.body[:cut] if kind != "trickle" else b""))
        await writer.drain()
        if kind == "short":
            return False
        if kind == "stall_reply":
            with suppress(TimeoutError):  # a client that gives up closes the connection
                await asyncio.wait_for(reader.read(1), self.stall_s)
        if kind == "trickle":
            for byte in answer.body[: int(self.stall_s / 0.05)]:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
        raise _ResetError

    async def _forward(self, request: _Message) -> _Message:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream_port, limit=_HEAD_BYTES)
        try:
            writer.write(request.head + request.body)
            await writer.drain()
            answer = _Message(await reader.readuntil(b"\r\n\r\n"))
            answer.body = await _body_of(answer, request.is_head, reader)
        finally:
            writer.close()
        return answer

    async def _cut(self, request: _Message) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        writer.write(request.head + request.body)
        await writer.drain()
        _reset(writer)

    async def _pass_the_hole(self) -> None:
        if self._hole:
            while self._hole:
                await asyncio.sleep(0.02)
            raise _ResetError

    def _send(self, writer: asyncio.StreamWriter, answer: _Message) -> bool:
        writer.write(answer.head + answer.body)
        return answer.header("Connection").lower() != "close"

    def _draw(self, request: _Message) -> str:
        """Return the kind of fault for this request and count it; or none."""
        self.requests += 1
        lot = self._draws.random()
        if self._left == 0 or not self._only.search(request.first_line):
            return ""
        for kind, rate in self._rates.items():
            lot -= rate
            if lot < 0:
                if kind.endswith("_request") and int(request.header("Content-Length") or 0) < 2:
                    return ""
                self._count(kind, 1)
                return kind
        return ""

    def _count(self, kind: str, change: int) -> None:
        self.injected[kind] += change
        if self._left is not None:
            self._left -= change

    def _error(self, request: _Message) -> _Message:
        line, code = self._draws.choice(self.errors)
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        head = f"HTTP/1.1 {line}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        return _Message(head.encode(), b"" if request.is_head else body)


async def _body_of(answer: _Message, is_head: bool, reader: asyncio.StreamReader) -> bytes:
    """Read the body of an answer as sent, chunks with their lengths."""
    if is_head or answer.first_line.split()[1] in ("204", "304"):
        return b""
    if answer.header("Transfer-Encoding").lower() == "chunked":
        chunks = []
        while True:
            chunks.append(line := await reader.readuntil(b"\r\n"))
            chunks.append(await reader.readexactly(int(line, 16) + 2))
            if int(line, 16) == 0:
                return b"".join(chunks)
    if size := answer.header("Content-Length"):
        return await reader.readexactly(int(size))
    return await reader.read()


def _suits(kind: str, answer: _Message) -> bool:
    if kind == "flip" and (answer.header("Transfer-Encoding") or "xml" in answer.header("Content-Type")):
        return False
    return len(answer.body) > 0


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection so that the other side sees a reset."""
    with suppress(OSError):  # it is closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
