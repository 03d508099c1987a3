"""The control channel: one JSON object per line over TCP, of bounded length, answered in turn.

The first line of a connection says what it is for. A connection for data is the engine's from then on.

An answer may take long: pinned panels are filled, or memory is given back. Meanwhile lines say that it is being worked
on (`Pulse`), so who asked waits for as long as they come. Who gives up says so in place of an answer, asked or not.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from ..addresses import address_of
from ..errors import FlashError

__all__ = ["FIRST_LINE", "LONGEST_LINE", "Line", "Pulse", "Wire", "connect", "is_loopback", "keep_alive"]

FIRST_LINE = 4096  # bytes: before the token is known to be right
LONGEST_LINE = 8 << 20  # bytes: names of all weights
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))  # seconds, and times

_AT_WORK = {"at": "work"}  # no answer yet
_GIVEN_UP = "given_up"  # why: no answer any more

Line = dict[str, Any]


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches the address."""
    return all(str(found[4][0]).startswith("127.") for found in socket.getaddrinfo(host, None, socket.AF_INET))


def keep_alive(connection: socket.socket) -> None:
    """The kernel notices within half a minute that the other host is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def connect(endpoint: str, timeout: float) -> socket.socket:
    """A connection to a worker. Raises OSError."""
    host, port = address_of(endpoint)
    connection = socket.create_connection((host, port), timeout)
    keep_alive(connection)
    return connection


class Wire:
    """One end of a connection. Not for two threads at once."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._buffer = b""
        self._due = 0  # answers to what was asked

    def send(self, line: Line) -> None:
        """Raises OSError."""
        self.connection.sendall(json.dumps(line).encode() + b"\n")

    def receive(self, longest: int = LONGEST_LINE, *, exactly: bool = False) -> Line | None:
        """The next line; None: the other end has left.

        Args:
            longest: bytes.
            exactly: nothing behind the line is read.

        Raises:
            FlashError: no line, or none that makes sense.
            OSError: the connection is lost, or (TimeoutError) nothing came in time.
        """
        while b"\n" not in self._buffer:
            piece = self.connection.recv(1 if exactly else 1 << 16)
            if not piece:
                if self._buffer:
                    raise FlashError("the connection ended within a line")
                return None
            self._buffer += piece
            if len(self._buffer) > longest:
                raise FlashError(f"a line of more than {longest} bytes")
        text, _, self._buffer = self._buffer.partition(b"\n")
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            raise FlashError("a line that is not JSON") from None
        if not isinstance(line, dict):
            raise FlashError("a line that is no JSON object")
        return line

    def ask(self, line: Line) -> Line:
        """Sends a line and returns the answer. Where Ctrl-C came between, answers to what was asked before come first.

        Raises:
            OSError: the connection is lost, or nothing came in time.
            FlashError: what came makes no sense.
        """
        self._due += 1
        self.send(line)
        while True:
            answer = self.receive()
            if answer is None:
                raise ConnectionError("the other end has left")
            if answer == _AT_WORK:
                continue
            if _GIVEN_UP in answer:
                raise FlashError(str(answer[_GIVEN_UP]))
            self._due -= 1
            if self._due == 0:
                return answer

    def close(self) -> None:
        self.connection.close()


class Pulse:
    """Says that an answer is being worked on, while it takes long.

    Args:
        wire: on which nobody else sends.
    """

    def __init__(self, wire: Wire) -> None:
        self.seconds = 0.02  # from one sign of life to the next, until the client has said how long it waits
        self._wire = wire
        self._turn = threading.Lock()
        self._since: float | None = None  # when work on an answer began
        threading.Thread(target=self._run, name="llama-flash worker at work", daemon=True).start()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While this lasts the other end is told. When it has ended, an answer may be sent."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            with self._turn:
                self._since = None

    def answer(self, line: Line) -> None:
        """Raises OSError."""
        with self._turn:
            self._wire.send(line)

    def give_up(self, why: str) -> None:
        """Nothing is sent after this. From any thread. Raises OSError."""
        self._turn.acquire(timeout=1.0)  # for good; who does not read does not hold this up
        self._wire.connection.settimeout(1.0)
        self._wire.send({_GIVEN_UP: why})

    def _run(self) -> None:
        while True:
            time.sleep(self.seconds)
            with self._turn:
                since = self._since
                if since is None or time.monotonic() - since < self.seconds:
                    continue
                try:
                    self._wire.send(_AT_WORK)
                except OSError:  # who reads answers will notice
                    return
