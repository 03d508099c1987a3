"""Clients of a server: so many requests under way, and the replies as they end.

Whoever takes a reply also takes the next requests from where they come from, in its own thread: requests are taken as
they are needed, by one thread at a time, and a source that raises does so where it is expected. Who takes slowly is
waited for: what is under way and what was not taken yet is never more than `limit`.
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Asking", "Ended", "Reply"]

_HEAD = {"Content-Type": "application/json", "Connection": "close"}


@dataclass(frozen=True)
class Reply:
    """What the server said to one request."""

    of: Any  # what the request came with
    status: int
    body: bytes


class Ended(Exception):
    """The server does not answer any more, or `close` was called."""


class Asking:
    """Replies to requests. Several threads may take them; each goes to one.

    Args:
        connect: a new connection to the server.
        requests: what a request comes with, its path and its body.
        limit: of requests under way.
    """

    def __init__(
        self,
        connect: Callable[[], http.client.HTTPConnection],
        requests: Iterator[tuple[Any, str, bytes]],
        limit: int,
    ) -> None:
        self._connect, self._requests, self._limit = connect, requests, limit
        self._source = threading.Lock()  # held while a request is taken
        self._todo: queue.SimpleQueue[tuple[Any, str, bytes] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # of all that follows
        self._replies: deque[Reply] = deque()
        self._n_open = 0  # begun, and the reply not taken
        self._is_empty = False  # no request is left to be begun
        self._failure: BaseException | None = None
        self._closed = False
        for n in range(limit):
            threading.Thread(target=self._work, name=f"batch-{n}", daemon=True).start()

    def take(self, seconds: float | None = None) -> Reply | None:
        """The next reply, or None if none came in this time. seconds: None: for ever.

        Raises:
            StopIteration: there are no more.
            Ended: the server does not answer any more, or `close` was called.
            Exception: whatever the requests raise.
        """
        self._fill()
        with self._changed:
            while self._closed or not self._replies:
                if self._failure is not None:
                    raise Ended(str(self._failure)) from self._failure
                if self._is_empty and not self._n_open:
                    raise StopIteration
                if not self._changed.wait(seconds) and seconds is not None:
                    return None
            self._n_open -= 1
            self._changed.notify_all()
            return self._replies.popleft()

    def close(self) -> None:
        """No request is begun any more; those under way end when the server does. Whoever waits is told."""
        with self._changed:
            self._closed = True
        self._fail(Ended("it was closed"))
        for _ in range(self._limit):
            self._todo.put(None)

    def left(self) -> list[Reply]:
        """What came and was not taken."""
        with self._changed:
            replies = list(self._replies)
            self._replies.clear()
        return replies

    def _fill(self) -> None:
        """Begins as many requests as may be under way. Not if another thread does it now."""
        if not self._source.acquire(blocking=False):
            return
        try:
            while self._may_begin():
                request = next(self._requests, None)
                with self._changed:
                    if request is None:
                        self._is_empty = True
                        self._changed.notify_all()
                    else:
                        self._n_open += 1
                if request is not None:
                    self._todo.put(request)
        finally:
            self._source.release()

    def _may_begin(self) -> bool:
        with self._changed:
            return not self._is_empty and self._n_open < self._limit and self._failure is None

    def _fail(self, failure: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _work(self) -> None:
        """A client."""
        while (request := self._todo.get()) is not None:
            of, path, body = request
            try:
                with contextlib.closing(self._connect()) as connection:
                    connection.request("POST", path, body, _HEAD)
                    response = connection.getresponse()
                    reply = Reply(of, response.status, response.read())
            except (OSError, http.client.HTTPException) as failure:
                self._fail(failure)
                return
            with self._changed:
                self._replies.append(reply)
                self._changed.notify_all()
