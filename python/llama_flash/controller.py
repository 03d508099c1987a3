"""One budget for all models of the process, kept while limits move and neighbours come and go.

A light thread looks at the limits (budget.rooms) and at the kernel's signs of pressure. What they leave, less what has
to stay in memory, is divided among the models' flash sessions; what has to be given back is given back by the plugin in
steps of a millisecond, between the operations of a decode.

    limits, neighbours, pressure  ->  room  ->  pool = room - reserve - all but flash  ->  a share for each session
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from .budget import Room, default_reserve, held_by_process, rooms
from .cgroup import Controller as Group
from .cgroup import Gauge, PressureWatch, memory_controller
from .sizes import format_size
from .status import StatusFile

__all__ = ["Callback", "Controller", "FlashEvent", "Session", "divide"]

logger = logging.getLogger("llama_flash")

_TICK = 0.25  # seconds between looks at all there is
_GLANCE = 0.015  # seconds between glances: usage near a limit, another limit, or pressure lead to a look at once
_REDISCOVER = 1.0  # seconds after which the process' groups are looked up again
_BUSY_TICK = 0.002  # while memory is given back or read ahead
_STATUS = 2.0  # seconds between two status files
_NEIGHBOURS = 20.0  # seconds for which the most that neighbours held is kept free
_CALM = 2.0  # seconds without pressure after which it is forgotten, bit by bit
_STEP_SHARE = 0.06  # of the flash memory: given back at each sign of pressure
_STEP_MIN = 16 << 20
_GROW_MIN = 4 << 20  # bytes that are worth growing by

EventKind = Literal["shrink", "grow", "pressure", "short"]


@dataclass(frozen=True)
class FlashEvent:
    """Something happened to a model's flash memory. Callbacks of `llm.flash.on_event` get these.

    kind: "shrink" or "grow": it moves from `before` to `after` bytes; "pressure": the kernel found it hard to free
    memory; "short": the limit leaves less than what cannot be given back while the model is loaded, `after` is that.
    """

    kind: EventKind
    before: int
    after: int
    reason: str  # what set the limit
    time: float  # time.time()


class Session(Protocol):
    """What the controller knows of a model: its flash memory, in bytes."""

    @property
    def asked(self) -> int | None: ...  # budget that the user set for the process; None: what the limits allow
    @property
    def reserve(self) -> int | None: ...  # as set by the user
    @property
    def fixed(self) -> int: ...  # of this model, beside flash and interpreter
    @property
    def interpreter(self) -> int: ...  # and all else that was there when the model was loaded
    @property
    def granted(self) -> int: ...  # flash memory it is on the way to
    @property
    def least(self) -> int: ...  # flash memory that it cannot give back
    @property
    def most(self) -> int: ...  # flash memory from which on nothing need be read
    @property
    def touched(self) -> int: ...  # flash memory in use now

    def move(self, n_bytes: int, urgent: bool) -> bool: ...  # a step on the way; True: arrived
    def warm(self) -> bool: ...  # reads what was hot in another life; False: nothing left to read
    def limited(self, total: int, reserve: int, reason: str) -> None: ...  # the budget in force
    def tell(self, event: FlashEvent) -> None: ...
    def describe(self) -> dict[str, object]: ...


def divide(pool: int, sessions: Sequence[tuple[int, int]]) -> list[int]:
    """Shares of `pool` bytes for sessions with (least, most) bytes: the least for all, then alike in proportion.

    The shares add up to no more than the pool, unless the least do.
    """
    shares = [least for least, _ in sessions]
    left = pool - sum(shares)
    wants = [max(0, most - least) for least, most in sessions]
    total = sum(wants)
    if left > 0 and total > 0:
        scale = min(1.0, left / total)
        shares = [share + int(want * scale) for share, want in zip(shares, wants, strict=True)]
    return shares


class Controller:
    """Divides the process' budget among its sessions, and follows the limits. `Controller.of_process()` is the one.

    Args:
        root: root of the file system whose /proc and /sys are read.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._lock = threading.RLock()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._called = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(self._called, select.POLLIN)
        self._pressure: PressureWatch | None = None
        self._status = StatusFile()
        self._neighbours: deque[tuple[float, dict[str, int]]] = deque()  # (time, others by room)
        self._limits: dict[str, int] = {}  # by room, at the last look
        self._near = 0  # bytes below a limit that are an alarm
        self._interpreter = 0  # bytes, before the first session's model was loaded
        self._ceiling: float | None = None  # of the pool, because of pressure
        self._last_pressure = -1e9
        self._last_tick = 0.0
        self._paused = 0
        self._groups: Group | None = None
        self._groups_known = -1e9
        self._gauges: list[Gauge] = []
        self._pressed = False  # since the last look
        self.seconds = 0.0  # CPU time of the thread

    @staticmethod
    def of_process() -> Controller:
        """The controller of this process."""
        return _the_controller

    # sessions

    def join(self, session: Session) -> None:
        """The session has memory; from now on its share follows the limits."""
        with self._lock:
            if not self._sessions:
                self._interpreter = session.interpreter
            self._sessions.add(session)
            if self._thread is None or not self._thread.is_alive():
                self._start()
        os.eventfd_write(self._called, 1)

    def leave(self, session: Session) -> None:
        """The session's memory is gone, or about to be."""
        with self._lock:
            self._sessions.discard(session)
            if not self._sessions:
                self._status.remove()
        os.eventfd_write(self._called, 1)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Around the load of another model: those that are there make room for it, and do not grow meanwhile."""
        with self._lock:
            self._paused += 1
            n = len(self._sessions)
            for session in self._sessions:
                self._move(session, session.least + (session.granted - session.least) * n // (n + 1), "another model")
            self._finish()
        try:
            yield
        finally:
            with self._lock:
                self._paused -= 1
            os.eventfd_write(self._called, 1)

    def settle(self) -> None:
        """Applies the limits now, and waits until what must be given back is given back."""
        with self._lock:
            self._follow(time.monotonic())
            self._finish()

    # the thread

    def _start(self) -> None:
        if self._pressure is None:
            self._pressure = PressureWatch(self._root)
            for event in self._pressure.events:
                self._poller.register(event, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="llama-flash", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        told = 0.0
        while True:
            try:
                with self._lock:
                    if not self._sessions:
                        self._thread = None
                        return
                    busy = self.tick(time.monotonic())
                    if time.monotonic() - told > _STATUS:
                        told = time.monotonic()
                        ago = told - self._last_pressure if self._last_pressure > 0 else None
                        self._status.write([session.describe() for session in self._sessions], ago)
            except Exception:  # a thread that dies would leave the limit unwatched
                logger.exception("llama-flash: the controller met an error and goes on")
                busy = False
            self.seconds = time.thread_time()
            if self._wait(_BUSY_TICK if busy else _GLANCE):
                self._pressed = self._pressure is not None and self._pressure.poll(time.monotonic())

    def _wait(self, seconds: float) -> bool:
        """Until somebody calls, there is pressure (True), or the time has passed."""
        ready = [event for event, _ in self._poller.poll(seconds * 1000)]
        if self._called in ready:
            os.eventfd_read(self._called)
        return any(event != self._called for event in ready)

    def tick(self, now: float) -> bool:
        """One look at the limits, and a step towards what they ask for. True: there is more to do soon."""
        busy = False
        if now - self._last_tick >= _TICK or now < self._last_tick or self._glance():
            self._last_tick = now
            self._follow(now)
        for session in self._sessions:
            busy = not session.move(session.granted, False) or busy
            if not self._paused and not busy:
                busy = session.warm() or busy
        return busy

    # decisions

    def _follow(self, now: float) -> None:
        if self._paused or not self._sessions:
            return
        if now - self._groups_known > _REDISCOVER:
            self._groups, self._groups_known = memory_controller(self._root), now
        found = rooms(self._root, controller=self._groups)
        room, reason = self._tightest(found, now)
        limits = {r.name: r.limit for r in found}
        if any(limit > self._limits.get(name, limit) for name, limit in limits.items()):
            self._ceiling, self._last_pressure = None, -1e9  # a limit was raised: what was tight before says nothing
        self._limits = limits
        sessions = list(self._sessions)
        asked = [session.asked for session in sessions]
        if all(value is not None for value in asked):
            most = max(value for value in asked if value is not None)
            if most < room:
                room, reason = most, "dram_budget"
        reserve = max(default_reserve(room) if s.reserve is None else s.reserve for s in sessions)
        self._watch([room.group for room in found if room.group], reserve // 2)
        granted = sum(session.granted for session in sessions)
        pressed = self._note_pressure(now, granted, reason)
        fixed = self._fixed(sessions, reserve)
        pool = room - reserve - fixed
        if self._ceiling is not None:
            pool = min(pool, int(self._ceiling))
        shares = divide(pool, [(session.least, session.most) for session in sessions])
        # the kernel acts when usage meets the limit: then nothing is moved, but dropped
        urgent = pressed or room - fixed - sum(session.touched for session in sessions) < reserve // 2
        for session, share in zip(sessions, shares, strict=True):
            session.limited(room, reserve, reason)
            calm = now - self._last_pressure > _CALM
            slack = 0 if urgent else reserve // 8  # a little comes from the reserve
            less = share < session.granted - slack
            if less or (calm and share > session.granted + _GROW_MIN):
                self._move(session, share, reason, urgent)
        if pool < sum(session.least for session in sessions):
            for session in sessions:
                session.tell(FlashEvent("short", session.granted, session.least, reason, time.time()))

    def _watch(self, groups: list[Path], near: int) -> None:
        """Keeps the gauges of these groups at hand."""
        if [gauge.group for gauge in self._gauges] != groups:
            for gauge in self._gauges:
                gauge.close()
            self._gauges = [Gauge(group) for group in groups]
        self._near = near

    def _glance(self) -> bool:
        """Whether there is a reason to look closer."""
        alarmed = [gauge.alarmed(self._near) for gauge in self._gauges]
        return self._pressed or any(alarmed)

    def _tightest(self, found: list[Room], now: float) -> tuple[int, str]:
        """The least that a limit leaves, beside the most that neighbours have held lately."""
        self._neighbours.append((now, {room.name: room.others for room in found}))
        while self._neighbours[0][0] < now - _NEIGHBOURS:
            self._neighbours.popleft()
        best, reason = None, ""
        for room in found:
            others = max(held.get(room.name, 0) for _, held in self._neighbours)
            left = max(0, room.limit - others)
            if best is None or left < best:
                best, reason = left, room.name
        assert best is not None
        return best, reason

    def _fixed(self, sessions: Sequence[Session], reserve: int) -> int:
        """What the process takes beside flash: as planned, or as it is, if that eats too much of the reserve."""
        touched = sum(session.touched for session in sessions)
        planned = self._interpreter + sum(session.fixed for session in sessions)
        return max(planned, held_by_process(self._root) - touched - reserve // 2)

    def _note_pressure(self, now: float, granted: int, reason: str) -> bool:
        pressed = self._pressed or (self._pressure is not None and self._pressure.poll(now))
        self._pressed = False
        if pressed:
            self._last_pressure = now
            self._ceiling = granted - max(_STEP_MIN, _STEP_SHARE * granted)
            for session in self._sessions:
                session.tell(FlashEvent("pressure", session.granted, session.granted, reason, time.time()))
        elif self._ceiling is not None and now - self._last_pressure > _CALM:
            self._ceiling += max(_STEP_MIN, self._ceiling * 0.05)
            if self._ceiling > sum(session.most for session in self._sessions):
                self._ceiling = None
        return pressed

    def _move(self, session: Session, n_bytes: int, reason: str, urgent: bool = False) -> None:
        n_bytes = min(max(n_bytes, session.least), session.most)
        before = session.granted
        if n_bytes == before:
            return
        session.move(n_bytes, urgent)
        kind: EventKind = "shrink" if n_bytes < before else "grow"
        logger.debug("flash memory: %s to %s (%s)", format_size(before), format_size(n_bytes), reason)
        session.tell(FlashEvent(kind, before, n_bytes, reason, time.time()))

    def _finish(self, seconds: float = 5.0) -> None:
        """Goes on until all sessions have arrived."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            arrived = [session.move(session.granted, False) for session in self._sessions]
            if all(arrived):
                return
            time.sleep(_BUSY_TICK)


Callback = Callable[[FlashEvent], None]
_the_controller = Controller()


def _after_fork() -> None:
    """The sessions are the parent's, and so is the thread."""
    global _the_controller
    _the_controller = Controller()


os.register_at_fork(after_in_child=_after_fork)
