"""What answers at a server's address while its model cannot be loaded: status 503, with the reason.

A worker of the model is away (docs/explanation/workers.md). Clients are to ask again; OpenAI's do so by themselves.
"""

from __future__ import annotations

import contextlib
import hmac
import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

from .address import bound

__all__ = ["StandIn"]

_TRY_AGAIN = 0.02  # seconds: the port is the server's until that has ended
_LOOK = 0.1  # seconds between two looks at whether it is to end
_SLOWEST = 5.0  # seconds that a client may take, in all
_MOST = 64  # clients at the same time
_HEAD = 64 << 10  # bytes of a request before its body
_LONGEST = 8 << 20  # bytes of a body that are taken, so that its client reads the answer
_PIECE = 64 << 10  # bytes of it that are held

# what pages of other addresses may do, as llama-server is told by engine_server.py: --cors-origins localhost
_LOCAL = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?")
_BEFORE = MappingProxyType(
    {
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": "*",
    }
)


class StandIn:
    """Answers as soon as the address is free, until it is closed.

    Args:
        why: it cannot answer; for those who know the key.
        key: of clients; None: nobody is asked for one.
        metrics: text of /metrics.
    """

    def __init__(self, host: str, port: int, why: str, key: str | None, metrics: Callable[[], str]) -> None:
        self._address = host, port
        self._say = why, key, metrics
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stand-in", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The address is free then."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                listener = bound(*self._address)
            except OSError:
                self._closing.wait(_TRY_AGAIN)
                continue
            with _Server(listener, *self._say) as server:
                server.timeout = _LOOK
                while not self._closing.is_set():
                    server.handle_request()
                    server.end_slow()
            return


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 2 * _MOST
    block_on_close = False  # nobody waits for a slow client

    def __init__(self, listener: socket.socket, why: str, key: str | None, metrics: Callable[[], str]) -> None:
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.why, self.key, self.metrics = why, key, metrics
        self._free = threading.Semaphore(_MOST)
        self._ends: dict[socket.socket, float] = {}  # by connection: when its time is over
        self.server_activate()

    def end_slow(self) -> None:
        """Clients whose time is over are left."""
        now = time.monotonic()
        for connection in [connection for connection, end in list(self._ends.items()) if end < now]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._ends):  # they are answered without what they had to say
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._ends[request] = time.monotonic() + _SLOWEST
        try:
            super().process_request(request, client_address)
        except BaseException:  # there are no more threads
            self._leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def _leave(self, request: Any) -> None:
        self._ends.pop(request, None)
        self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave."""


class _Head(io.BufferedReader):
    """A connection whose lines, all together, are of bounded length."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        self._left = _HEAD

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("head")
        return line


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SLOWEST

    def setup(self) -> None:
        super().setup()
        self.rfile: _Head = _Head(self.rfile.detach())

    def answer(self) -> None:
        self._take_body()
        path, said = self.path.partition("?")[0], self.server.why
        if path in ("/health", "/v1/health"):  # told to everybody
            self._send(503, _error(503, "the model cannot be loaded: a worker is away"))
        elif not self._knows_the_key():
            self._send(401, _error(401, "Invalid API Key", "authentication_error"))
        elif path == "/metrics":
            self._send(200, self.server.metrics(), "text/plain; version=0.0.4")
        else:
            self._send(503, _error(503, said))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = answer

    def do_OPTIONS(self) -> None:
        """What browsers ask before a request, without the key."""
        self._take_body()
        self._send(200, "", "text/html", _BEFORE)

    def _take_body(self) -> None:
        with contextlib.suppress(ValueError):
            left = min(_LONGEST, int(self.headers.get("Content-Length", 0)))
            while left > 0 and (piece := self.rfile.read1(min(left, _PIECE))):
                left -= len(piece)

    def _knows_the_key(self) -> bool:
        """Said where llama-server lets clients say it."""
        said = self.headers.get("Authorization") or self.headers.get("X-Api-Key") or ""
        given = said.removeprefix("Bearer ").encode("latin-1", "replace")  # the bytes that were sent
        return self.server.key is None or hmac.compare_digest(given, self.server.key.encode())

    def _send(
        self,
        status: int,
        text: str,
        kind: str = "application/json; charset=utf-8",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        if status == 503:
            self.send_header("Retry-After", "1")
        origin = self.headers.get("Origin", "")
        if _LOCAL.fullmatch(origin):
            self.send_header("Access-Control-Allow-Origin", origin)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""


def _error(status: int, message: str, kind: str = "unavailable_error") -> str:
    return json.dumps({"error": {"code": status, "message": message, "type": kind}})
