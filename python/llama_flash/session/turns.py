"""Several threads at one `llama_cpp.Llama`: they take turns.

A `Llama` keeps tokens, logits and a KV cache, so what interleaves is not two decodes but two generations. A *turn* is a
whole one: a call, or a stream from its first piece to its end, whichever threads ask for its pieces. Who comes
meanwhile waits, first come, first served. A stream that is closed, or collected, gives its turn up. If only garbage
refers to a stream, a thread that waits runs the garbage collector, and the turn is free.

What a thread does while its own stream rests belongs to the stream's turn: a thread that waited for itself would wait
for ever. If no thread asks for a stream's next piece for a long time, the threads that wait get an error; the stream
itself can go on.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import thread as _pools
from contextvars import ContextVar
from types import FrameType
from typing import Any, TypeVar

from ..errors import FlashError
from .keeping import keep_prompts
from .states import check_workers

__all__ = ["Turn", "take_turns"]

_T = TypeVar("_T")

_CALLS = ("embed", "eval", "load_state", "reset", "sample", "save_state", "set_seed")
_GENERATORS = ("_create_completion", "generate")
_COLLECT_AFTER, _COLLECT_AGAIN = 0.2, 5.0  # seconds of waiting for a stream that rests
_LONGEST_REST = 60.0  # seconds: a stream whose next piece was not asked for so long is not waited for

# what of a pool works off a job; another job in the same thread has nothing to do with it
_JOB = getattr(getattr(_pools, "_WorkItem", None), "run", None)


class _Hold:
    """A turn that is taken."""

    def __init__(self) -> None:
        self.users = 1  # streams and calls that share it
        self.thread = threading.get_ident()  # in which it was last worked for
        self.job = _job()
        self.name = threading.current_thread().name
        self.rests_since = time.monotonic()


class _Waiter:
    def __init__(self) -> None:
        self.hold = _Hold()  # of this thread, not of the one that will call it
        self.has_turn = False
        self.called = threading.Lock()
        self.called.acquire()


_within: ContextVar[_Hold | None] = ContextVar("llama_flash_turn", default=None)


class Turn:
    """Whose turn it is at one `Llama`.

    Streams end in whichever thread collects them, and there in the midst of anything: what is locked then is a lock
    that a thread may take twice, and is held for a few instructions that wait for nothing.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._guard = threading.RLock()  # of what follows
        self._hold: _Hold | None = None
        self._waiters: deque[_Waiter] = deque()
        self._closed = False
        self._work = threading.Lock()  # held by whoever computes
        self._working = 0  # thread that does, 0: none

    def take(self) -> _Hold:
        """Waits for the turn, or shares the one that this thread has. To be given back.

        Raises:
            FlashError: the model is closed, or nobody asks for what is waited for.
        """
        if self.forked:  # a child has nobody to wait for, and the guard may never open
            return _Hold()
        with self._guard:
            self._refuse_if_closed()
            if self._hold is None:
                self._hold = _Hold()
                return self._hold
            if self._is_ours(self._hold):
                self._hold.users += 1
                return self._hold
            me = _Waiter()
            self._waiters.append(me)
        try:
            self._wait(me)
            self._refuse_if_closed()
        except BaseException:
            with self._guard:
                if me in self._waiters:
                    self._waiters.remove(me)
                elif me.has_turn:
                    self.give_back(me.hold)
            raise
        return me.hold

    def give_back(self, hold: _Hold) -> None:
        """Whoever waits longest is called when nobody shares the turn any more."""
        if self.forked:
            return
        with self._guard:
            hold.users -= 1
            if hold.users or self._hold is not hold:
                return
            self._hold = None
            if self._waiters:
                waiter = self._waiters.popleft()
                waiter.has_turn, self._hold = True, waiter.hold
                waiter.called.release()

    def share(self, hold: _Hold) -> None:
        """For one more user of this thread's turn, who gives it back, too."""
        with self._guard:
            hold.users += 1

    @contextlib.contextmanager
    def working(self, hold: _Hold) -> Iterator[None]:
        """While this thread computes in the turn: streams that share one may be asked in several threads.

        Raises:
            FlashError: the model is closed.
        """
        with self._computing():
            self._refuse_if_closed()
            hold.thread, hold.job, hold.name = threading.get_ident(), _job(), threading.current_thread().name
            _within.set(hold)
            try:
                yield
            finally:
                hold.rests_since = time.monotonic()

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that has made it."""
        return self._pid != os.getpid()

    def works_here(self) -> bool:
        """Whether this thread computes already, and calls itself."""
        return self._working == threading.get_ident()

    @contextlib.contextmanager
    def held(self) -> Iterator[_Hold]:
        """The turn, for a call."""
        hold = self.take()
        try:
            with self.working(hold):
                yield hold
        finally:
            self.give_back(hold)

    @contextlib.contextmanager
    def last(self) -> Iterator[None]:
        """For closing: waits for what is being computed, not for streams that rest, and refuses what would follow."""
        with self._computing():
            with contextlib.nullcontext() if self.forked else self._guard:
                self._closed = True
                while self._waiters:
                    self._waiters.popleft().called.release()
            yield

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        if self.works_here() or self.forked:
            yield
            return
        with self._work:
            self._working = threading.get_ident()
            try:
                yield
            finally:
                self._working = 0

    @property
    def is_free(self) -> bool:
        """Whether nobody has it, as far as can be seen without waiting."""
        return self._hold is None

    @contextlib.contextmanager
    def beside(self) -> Iterator[bool]:
        """Between two calls, while nobody computes: whether nobody has the turn, so that nobody waits either."""
        with self._computing():
            yield self._hold is None and not self._closed

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise FlashError("this Llama is closed: it cannot compute any more, nor go on with what it has begun")

    def _is_ours(self, hold: _Hold) -> bool:
        me = threading.get_ident()
        if self.works_here():
            return True
        if hold.thread != me or self._working:
            return False
        # Threads of a pool work for many, which contexts or the pool's jobs tell apart. The main thread works for one.
        if threading.current_thread() is threading.main_thread() or _in_event_loop():
            return True
        return _within.get() is hold and hold.job == _job()

    def _wait(self, me: _Waiter) -> None:
        began = time.monotonic()
        collect, give_up = began + _COLLECT_AFTER, began + _LONGEST_REST
        while not me.called.acquire(timeout=max(0.0, min(collect, give_up) - time.monotonic())):
            now, hold = time.monotonic(), self._hold
            if now >= collect:
                collect = now + _COLLECT_AGAIN
                if not self._working and self._waiters and self._waiters[0] is me:
                    gc.collect()  # a stream that nobody can ask any more
            if now < give_up:
                continue
            give_up = now + 1.0
            if hold is not None and not self._working and now >= hold.rests_since + _LONGEST_REST:
                raise FlashError(
                    f"waited {now - began:.0f} s for another text of this model: its stream, last read in thread "
                    f"{hold.name!r}, is neither read on nor closed. Read it to its end, or call its close()"
                )


class _Stream(Generator[Any, Any, None]):
    """A generator that is worked for in a turn of its own, from its first piece on."""

    def __init__(self, turn: Turn, inner: Generator[Any, Any, None], hold: _Hold | None = None) -> None:
        """hold: a turn that was taken for it already."""
        self._turn, self._inner, self._hold = turn, inner, hold
        self._ended = False

    def send(self, value: Any) -> Any:
        return self._ask(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return self._ask(self._inner.throw, *error)

    def close(self) -> None:
        if self._ended:
            return
        if self._hold is None:
            self._inner.close()
            return
        with self._turn._computing():  # until it is not asked in another thread
            self._inner.close()
        self._end()

    def __del__(self) -> None:
        if getattr(self, "_hold", None) is not None and not self._ended:
            self._inner.close()
            self._end()

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        if self._ended:
            return call(*arguments)
        if self._hold is None:
            self._hold = self._turn.take()
        try:
            if self._turn.works_here():
                return call(*arguments)
            with self._turn.working(self._hold):
                return call(*arguments)
        except BaseException:  # StopIteration too: no generator goes on after one
            self._inner.close()
            self._end()
            raise

    def _end(self) -> None:
        if not self._ended and self._hold is not None:
            self._ended = True
            self._turn.give_back(self._hold)


def take_turns(cls: type[_T]) -> type[_T]:
    """Has the methods of `Llama` that use its context take turns; `self._turn` is a Turn."""
    cls.load_state = _after_recall(cls.load_state)  # type: ignore[attr-defined]
    keep_prompts(cls)
    check_workers(cls)
    for name in _CALLS:
        setattr(cls, name, _in_turn(getattr(cls, name)))
    for name in _GENERATORS:
        setattr(cls, name, _streamed(getattr(cls, name)))
    cls.create_chat_completion = _handled(cls.create_chat_completion)  # type: ignore[attr-defined]
    return cls


def _check_process(llm: Any) -> None:
    """Before the engine is asked: a forked child finds its state as it was, whoever was changing it."""
    if llm._turn.forked and llm.flash is not None:
        llm.flash.check_process()


def _in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._turn.works_here():  # for each token, several times
            return method(self, *args, **kwargs)
        _check_process(self)
        with self._turn.held():
            return method(self, *args, **kwargs)

    return call


def _after_recall(method: Callable[..., Any]) -> Callable[..., Any]:
    """The KV cache is about to be filled, as by a prompt."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.flash is not None:
            self.flash.before_state()
        return method(self, *args, **kwargs)

    return call


def _streamed(method: Callable[..., Generator[Any, Any, None]]) -> Callable[..., _Stream]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> _Stream:
        _check_process(self)
        return _Stream(self._turn, method(self, *args, **kwargs))

    return call


def _handled(method: Callable[..., Any]) -> Callable[..., Any]:
    """A chat handler of the user's has put pictures into the context, before what it returns is asked."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.chat_handler is None:
            return method(self, *args, **kwargs)
        with self._turn.held() as hold:
            answer = method(self, *args, **kwargs)
            if not isinstance(answer, Iterator):
                return answer
            inner: Any = answer if inspect.isgenerator(answer) else (piece for piece in answer)
            self._turn.share(hold)
            return _Stream(self._turn, inner, hold)

    return call


def _in_event_loop() -> bool:
    asyncio = sys.modules.get("asyncio.events")
    return asyncio is not None and asyncio._get_running_loop() is not None


def _job() -> object:
    """What a pool has this thread do; None where it is not a pool's."""
    if _JOB is None or threading.current_thread() is threading.main_thread():
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _JOB.__code__:
            return weakref.ref(frame.f_locals["self"])
        frame = frame.f_back
    return None
