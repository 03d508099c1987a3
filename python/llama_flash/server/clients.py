"""Around the server's application: who is still there, and what went wrong after an answer had begun.

Upstream notices that a client has gone when the next piece of a stream is there, and not at all where nothing is
streamed. Here each request knows at once, and the engine asks after each decode (`stop_if_gone`): what nobody waits
for ends, and the next request's turn comes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from contextvars import ContextVar
from typing import Any

import anyio
from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import FlashBudgetError, FlashReadError

__all__ = ["Clients", "Stopped", "stop_if_gone"]

logger = logging.getLogger("llama_flash")

_GONE: Message = {"type": "http.disconnect"}


class Stopped(HTTPException):
    """The answer is given up. As an HTTPException it passes upstream's handlers without a traceback."""

    def __str__(self) -> str:
        return self.detail


def _client_gone() -> Stopped:
    return Stopped(status_code=499, detail="the client closed the connection")


def _shutting_down() -> Stopped:
    return Stopped(status_code=503, detail="the server is shutting down")


class Clients:
    """ASGI application around `app`.

    Attributes:
        in_flight: requests for generation that run or wait for their turn.
        answered: requests so far, by path and status.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.in_flight = 0
        self.answered: Counter[tuple[str, int]] = Counter()
        self._requests: set[_Request] = set()

    def stop(self) -> None:
        """Gives up what is being answered: the server shuts down."""
        for request in self._requests:
            request.stopped = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(receive, send)
        generates = scope["method"] == "POST"
        self.in_flight += generates
        self._requests.add(request)
        mark = _current.set(request)
        try:
            await request.answer(self._app, scope)
        finally:
            _current.reset(mark)
            self._requests.discard(request)
            self.in_flight -= generates
            # only paths that exist: others could be made up without end
            path = getattr(scope.get("route"), "path", "other")
            self.answered[path, 499 if request.left else request.status] += 1


class _Request:
    """One request, while it is answered."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.status = 500
        self.gone = False  # the connection is closed, or the answer has come to its end
        self.left = False  # the client left before the answer's end
        self.stopped = False  # the server does not wait for it
        self._complete = False
        self._receive, self._send = receive, send
        self._queue, self._messages = anyio.create_memory_object_stream[Message]()
        self._streams = False
        self._end: Message | None = None

    async def answer(self, app: ASGIApp, scope: Scope) -> None:
        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(self._listen)
            try:
                await app(scope, self._next, self._pass_on)
            except Exception as error:
                failure = error
            self.left = self.gone and not (self._complete and failure is None)
            if not self.left:
                failure = await self._finish(failure)
            group.cancel_scope.cancel()
        self._messages.close()
        if failure is not None and not self.left:
            raise failure

    async def _listen(self) -> None:
        """Takes what the client sends as it comes, and thereby learns when it goes."""
        try:
            while (message := await self._receive())["type"] != "http.disconnect":
                await self._queue.send(message)
        finally:
            self.gone = True
            self._queue.close()

    async def _next(self) -> Message:
        if self.gone:
            return _GONE
        try:
            return await self._messages.receive()
        except anyio.EndOfStream:
            return _GONE

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
        elif not message.get("more_body", False):
            self._complete = True
            if self._streams:
                self._end = message  # kept until it is known that nothing went wrong
                return
        await self._send(message)

    async def _finish(self, failure: Exception | None) -> Exception | None:
        """Ends a stream: with an event that says what went wrong, if something did. Returns what is not yet told."""
        if not self._streams:
            return failure
        if failure is None and self._end is None:  # the event stream ends itself when the server shuts down
            failure = _shutting_down()
        if failure is not None:
            logger.error("a stream ended early: %s", failure)
            self.status = _status(failure)
            event = f"data: {json.dumps({'error': _described(failure)})}\n\n"
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await self._send(self._end or {"type": "http.response.body", "body": b"", "more_body": False})
        return None


_current: ContextVar[_Request | None] = ContextVar("llama_flash_request", default=None)


def stop_if_gone() -> None:
    """Raises Stopped in a thread that works for a request whose answer nobody waits for, or will get."""
    request = _current.get()
    if request is not None and request.gone:
        raise _client_gone()
    if request is not None and request.stopped:
        raise _shutting_down()


def _status(error: Exception) -> int:
    if isinstance(error, HTTPException):
        return error.status_code
    return 400 if isinstance(error, ValueError) else 500


def _described(error: Exception) -> dict[str, Any]:
    """As OpenAI's interface has it."""
    kinds = {
        FlashReadError: "flash_read_error",
        FlashBudgetError: "flash_budget_error",
        Stopped: "server_shutdown",
        ValueError: "invalid_request_error",
    }
    kind = next((name for cls, name in kinds.items() if isinstance(error, cls)), "internal_server_error")
    return {"message": str(error), "type": kind, "param": None, "code": None}
