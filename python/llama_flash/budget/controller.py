"""One budget for all models of the process, kept while limits move and neighbours come and go.

A light thread looks at the limits (budget.rooms) and at the kernel's signs of pressure. What they leave, less what has
to stay in memory, is divided among the models' flash sessions; what has to be given back is given back by the plugin in
steps of a millisecond, between the operations of a decode.

    limits, neighbours, pressure  ->  room  ->  pool = room - reserve - all but flash  ->  a share for each session
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..sizes import format_size
from .cgroup import Controller as Group
from .cgroup import Gauge, PressureWatch, is_alone, memory_controller
from .limits import threads_hint
from .rooms import LIBRARIES_MAX, Room, default_reserve, held_by_process, rooms
from .shares import Callback, EventKind, FlashEvent, Session, beside_flash, divide
from .status import StatusFile
from .steady import Steady

__all__ = ["Callback", "Controller", "EventKind", "FlashEvent", "Session", "divide"]

logger = logging.getLogger("llama_flash")

_TICK = 0.25  # seconds between looks at all there is
_GLANCE = 0.03  # seconds between glances: usage near a limit, another limit, or pressure lead to a look soon
_FAR_GLANCE = 0.06  # where a lot is left: no neighbour takes that in so short a time
_REST = 1.0  # seconds between looks while glances show that nothing changes
_SOON = 0.05  # seconds between looks at least
_REDISCOVER = 1.0  # seconds after which the process' groups are looked up again
_BUSY_TICK = 0.002  # while memory is given back or read ahead
_STATUS = 2.0  # seconds between two status files
_NEIGHBOURS = 20.0  # seconds for which the most that neighbours held is kept free
_AFTERMATH = 0.2  # seconds after a sign of pressure in which giving back goes on
_CALM = 2.0  # seconds without pressure after which the cache may grow again
_REGROWTH = 0.2  # share of the flash memory per second, after pressure
_STEP_SHARE = 0.06  # of the flash memory in use: given back at each sign of pressure
_STEP_MIN = 16 << 20
_GROW_MIN = 4 << 20  # bytes that are worth growing by, and of a small room
_GROW_SHARE = 256  # so many parts of it
_DISTURBED = 20.0  # seconds after pressure, or a lower limit, in which nothing is lent
_TIGHT = 0.05  # share of a limit: with less left, a group's pressure is about us
_LONGEST_LOAD = 120.0  # seconds after which a load is no longer waited for
_NEVER = -1e9


class Controller:
    """Divides the process' budget among its sessions, and follows the limits. `Controller.of_process()` is the one.

    The lock is held while sessions are moved; garbage collection may close a session meanwhile, in the same thread.

    Args:
        root: root of the file system whose /proc and /sys are read.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._lock = threading.RLock()
        self._joined: tuple[weakref.ref[Session], ...] = ()  # replaced as a whole
        self._asked: int | None = None  # budget of the process, in bytes: as it was last set
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._called: int | None = None  # eventfd that wakes the thread
        self._poller = select.poll()
        self._registered: set[int] = set()
        self._status = StatusFile()
        self._events: deque[tuple[Session, FlashEvent]] = deque()  # to be told when the lock is free
        self._loads = threading.Condition()
        self._loader: weakref.ref[object] | None = None
        self._loading_thread: threading.Thread | None = None
        self._groups: Group | None = None
        self._gauges: list[Gauge] = []
        self._pressure: PressureWatch | None = None
        self._last_failure = _NEVER
        self.companions: set[int] = set()  # processes below the same limit that take no more than they have
        self.seconds = 0.0  # CPU time of the thread
        self._forget()

    def _forget(self) -> None:
        """What was seen says nothing about the sessions to come."""
        self._interpreter = 0  # bytes, before the first session's model was loaded
        self._asked = None
        self._neighbours: deque[tuple[float, dict[str, int]]] = deque()  # (time, others by room)
        self._steady = Steady()
        self._ceiling: float | None = None  # of the pool, because of pressure
        self._pressed = False  # since the last look
        self._last_pressure = _NEVER
        self._last_look = _NEVER
        self._news = False  # models came or went since
        self._groups_known = _NEVER
        self._limits: dict[str, int] = {}  # by room, at the last look
        self._limits_moved = _NEVER
        self._own_group: Path | None = None  # nobody else was in it at the last look, and it was of use
        self._unsettled = False  # sessions are on their way, or may have something to read
        self._found: list[Room] = []  # at the last look
        self._grouped = False  # a group's limit is the tightest
        self._near = 0  # bytes below a limit that are an alarm
        self._tight_groups: list[Path] = []

    @staticmethod
    def of_process() -> Controller:
        """The controller of this process."""
        return _the_controller

    def _sessions(self) -> list[Session]:
        return [session for session in (ref() for ref in self._joined) if session is not None]

    # sessions

    def join(self, session: Session) -> None:
        """The session has memory; from now on its share follows the limits."""
        with self._lock:
            if not self._sessions():
                self._forget()
                self._interpreter = session.interpreter
            if session.asked is not None:
                self._asked = session.asked
            self._unsettled = True
            self._joined = (*(ref for ref in self._joined if ref() is not None), weakref.ref(session))
            if self._pressure is not None:
                self._pressure.poll(time.monotonic(), [])  # of the load
            self._start()
        self._call()

    def leave(self, session: Session) -> None:
        """The session's memory is gone, or about to be. When this returns, nobody is using it but the caller."""
        if sys.is_finalizing():  # the thread may have been ended with the lock in its hands
            return
        with self._lock:
            self._joined = tuple(ref for ref in self._joined if ref() not in (None, session))
            if not self._joined:
                self._status.remove()
        self._call()

    def ask(self, session: Session, asked: int | None, check: Callable[[int], None]) -> None:
        """Sets the budget of the process, in bytes (None: what the limits allow), and gives back what is too much.

        Args:
            check: is told the bytes without which the models cannot do, the reserve left out; raises if that is too
                much, and then nothing has changed.
        """
        with self._lock:
            sessions = self._sessions()
            reserve = self._reserve(asked or 0, sessions)
            measured = held_by_process(self._root) - sum(other.touched for other in sessions)
            check(self._fixed(sessions, reserve, measured) + sum(other.least for other in sessions))
            self._asked = asked
            self._look(time.monotonic())
            self._finish()
        self._deliver()

    def recall(self) -> None:
        """A model is about to compute many tokens at once, and is `decoding` no more: what was lent is given back."""
        with self._lock:
            self._look(time.monotonic())
            self._finish()
        self._deliver()

    def look_soon(self) -> None:
        """A model has begun to decode: there may be more to divide."""
        self._call()

    def idle(self, held: int) -> int:
        """Bytes of those planned for models beside flash that are not in use; held: by the process, these models'."""
        with self._lock:
            sessions = self._sessions()
            planned = self._interpreter + sum(session.fixed for session in sessions)
            return max(0, planned + sum(session.touched for session in sessions) - held) if sessions else 0

    # loads: one at a time, each sees what the others take

    def begin_load(self, loader: object) -> None:
        """Another model is about to be loaded: waits for loads under way; those that are there make room for it.

        To be followed by `end_load`. What others have left to give is found with `squeeze`.
        """
        end = time.monotonic() + _LONGEST_LOAD
        me = threading.current_thread()
        with self._loads:
            # what failed in this thread, or in one that has ended, may live on in a traceback
            while self._loading and (other := self._loading_thread) not in (None, me) and other.is_alive():
                if time.monotonic() > end:
                    logger.warning("llama-flash: a load that began %.0f s ago is not waited for", _LONGEST_LOAD)
                    break
                self._loads.wait(0.2)
            self._loader, self._loading_thread = weakref.ref(loader), me
        try:
            with self._lock:
                sessions = self._sessions()
                n = len(sessions)
                for session in sessions:
                    kept = (session.granted - session.least) * n // (n + 1)
                    self._move(session, session.least + kept, "another model")
                self._finish()
        except BaseException:
            self.end_load(loader)
            raise
        self._deliver()

    def squeeze(self) -> bool:
        """All models give back what they can. False: there was nothing to be given."""
        with self._lock:
            sessions = [session for session in self._sessions() if session.granted > session.least]
            for session in sessions:
                self._move(session, session.least, "another model")
            self._finish()
        self._deliver()
        return bool(sessions)

    def end_load(self, loader: object) -> None:
        """The load has ended, well or not. Does nothing if it had been ended before."""
        with self._loads:
            if self._loader is not None and self._loader() in (None, loader):
                self._loader = self._loading_thread = None
                self._loads.notify_all()
        self._call()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While this lasts no session is moved, and none leaves in another thread."""
        with self._lock:
            yield

    @property
    def _loading(self) -> bool:
        loader = self._loader
        return loader is not None and loader() is not None

    # the thread

    def _start(self) -> None:
        """Under the lock."""
        if self._stopping or (self._thread is not None and self._thread.is_alive()):
            return
        thread = threading.Thread(target=self._run, name="llama-flash", daemon=True)
        try:
            self._called = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            thread.start()
        except (OSError, RuntimeError) as error:  # the models run, each with the memory that it was given
            self._close_files()
            logger.warning("llama-flash: memory limits are not followed: %s (%s)", error, threads_hint())
            return
        self._thread = thread

    def _call(self) -> None:
        self._news = True
        called = self._called
        if called is not None:
            with contextlib.suppress(OSError):
                os.eventfd_write(called, 1)

    def stop(self) -> None:
        """Ends the thread; it is not started again. For the end of the interpreter."""
        self._stopping = True
        self._call()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)
        self._status.remove()

    def _run(self) -> None:
        told, pause = 0.0, _GLANCE
        while True:
            ready = self._wait(pause)
            try:
                with self._lock:
                    sessions = self._sessions()
                    if self._stopping or not sessions:
                        self._close_files()
                        self._thread = None
                        return
                    now = time.monotonic()
                    if ready and self._pressure is not None:
                        self._pressed = self._pressure.poll(now, self._tight_groups) or self._pressed
                    busy = self.tick(now)
                    pause = _BUSY_TICK if busy else self._until_glance()
                    if now - told > _STATUS and self._found:
                        told = now
                        ago = now - self._last_pressure if self._last_pressure > 0 else None
                        tightest = min(self._found, key=lambda room: room.bytes)
                        self._status.write([session.describe() for session in sessions], tightest, ago)
                del sessions
                self._deliver()
            except Exception:  # a thread that dies would leave the limit unwatched
                pause = _TICK
                if time.monotonic() - self._last_failure > 60:
                    self._last_failure = time.monotonic()
                    logger.exception("llama-flash: the controller met an error and goes on")
            self.seconds = time.thread_time()

    def _wait(self, seconds: float) -> bool:
        """Until somebody calls, there is pressure (True), or the time has passed."""
        called = self._called
        if called is None:
            return False
        self._register(called)
        ready = [event for event, _ in self._poller.poll(seconds * 1000)]
        if called in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(called)
        return any(event != called for event in ready)

    def _register(self, called: int) -> None:
        """What is to be waited for; the groups' events change when the process moves."""
        wanted = {called, *(self._pressure.events if self._pressure is not None else ())}
        if wanted != self._registered:
            self._poller = select.poll()
            for event in wanted:
                self._poller.register(event, select.POLLIN)
            self._registered = wanted

    def _close_files(self) -> None:
        for gauge in self._gauges:
            gauge.close()
        if self._pressure is not None:
            self._pressure.close()
        self._gauges, self._pressure, self._groups_known = [], None, _NEVER
        self._poller, self._registered = select.poll(), set()
        called, self._called = self._called, None
        if called is not None:
            os.close(called)

    def tick(self, now: float) -> bool:
        """One look at the limits if it is time, and a step towards what they ask for. True: more is to be done soon."""
        since = now - self._last_look
        moving = now - self._last_pressure < _AFTERMATH
        alarmed = since >= _SOON and (self._alarmed() or moving or self._joined_by_others())
        if alarmed or self._pressed or since >= _REST or (since >= _TICK and not self._still()):
            self._look(now)
        if not self._unsettled:
            return False
        sessions, loading = self._sessions(), self._loading
        arrived = [session.move(session.granted, False) for session in sessions]
        busy = not all(arrived)
        if not busy and not loading:
            warming = [session.warm() for session in sessions]
            busy = any(warming)
        self._unsettled = busy or loading
        return busy

    def _deliver(self) -> None:
        """Tells what has happened, without the lock: callbacks are the user's code."""
        while self._events:
            with contextlib.suppress(IndexError):
                session, event = self._events.popleft()
                try:
                    session.tell(event)
                except BaseException:  # SystemExit would end the thread
                    logger.exception("llama-flash: a callback of on_event failed")

    # decisions

    def _look(self, now: float) -> None:
        sessions = self._sessions()
        self._last_look, self._news = now, False
        if not sessions:
            return
        self._find_groups(now)
        found = self._found = rooms(self._root, controller=self._groups)
        room, tightest = self._tightest(found, now)
        reason, libraries = tightest.name, tightest.libraries
        self._note_limits(found, now)
        if self._asked is not None and self._asked < room:
            room, reason, libraries = self._asked, "dram_budget", LIBRARIES_MAX
        touched = sum(session.touched for session in sessions)
        decoding = all(session.decoding for session in sessions) and self._undisturbed(now, room, reason, tightest)
        measured = held_by_process(self._root, libraries=libraries if decoding else LIBRARIES_MAX) - touched
        reserve = self._reserve(room, sessions, self._steady.look(now, measured + tightest.others, decoding))
        self._watch(found, reserve)
        pressed = self._note_pressure(now, sessions, touched, reason)
        if pressed and decoding:
            decoding, reserve = False, self._reserve(room, sessions)
        soon = sum(session.soon(now) for session in sessions) if decoding else None
        fixed = self._fixed(sessions, reserve, measured, soon)
        pool = room - reserve - fixed
        short = pool < sum(session.least for session in sessions)
        if self._ceiling is not None:
            pool = min(pool, int(self._ceiling))
        shares = divide(pool, [(session.least, session.most) for session in sessions])
        # the kernel acts when usage meets the limit: then nothing is moved, but dropped
        urgent = pressed or room - fixed - touched < reserve // 2
        calm = now - self._last_pressure > _CALM and not self._loading
        for session, share in zip(sessions, shares, strict=True):
            beside = fixed - session.fixed + sum(other.granted for other in sessions if other is not session)
            session.limited(room, reserve, beside, reason)
            slack = 0 if urgent else reserve // 8  # a little comes from the reserve
            more = (
                share > session.granted + min(_GROW_MIN, room // _GROW_SHARE) or session.granted < share == session.most
            )
            if share < session.granted - slack or (calm and more):
                self._move(session, share, reason, urgent)
            if short:
                self._note(session, "short", session.granted, session.least, reason)

    def _undisturbed(self, now: float, room: int, reason: str, tightest: Room) -> bool:
        """Whether nobody else takes memory below the limit, so that nothing is kept for what comes at once."""
        self._own_group = None
        if now - self._last_pressure < _DISTURBED or now - self._limits_moved < _DISTURBED:
            return False
        if reason == "dram_budget" and room + default_reserve(tightest.bytes) < tightest.bytes:
            return True  # no limit of the kernel's is near
        if tightest.group is None or not is_alone(tightest.group, os.getpid(), self.companions):
            return False
        self._own_group = tightest.group
        return True

    def _joined_by_others(self) -> bool:
        return self._own_group is not None and not is_alone(self._own_group, os.getpid(), self.companions)

    def _find_groups(self, now: float) -> None:
        if now - self._groups_known <= _REDISCOVER:
            return
        before, self._groups, self._groups_known = self._groups, memory_controller(self._root), now
        if self._pressure is None or before != self._groups:
            if self._pressure is not None:
                self._pressure.close()
            self._pressure = PressureWatch(self._root)

    def _watch(self, found: Sequence[Room], reserve: int) -> None:
        """Keeps the gauges of the groups with a limit at hand, for glances."""
        groups = [room.group for room in found if room.group]
        if [gauge.group for gauge in self._gauges] != groups:
            for gauge in self._gauges:
                gauge.close()
            self._gauges = [Gauge(group) for group in groups]
        for gauge, room in zip(self._gauges, (room for room in found if room.group), strict=True):
            gauge.droppable = room.droppable
            gauge.looked = gauge.left = room.limit - room.held
        self._grouped = bool(groups) and min(found, key=lambda room: room.bytes).group is not None
        self._near = reserve // 2
        tight = [room for room in found if room.limit - room.held < max(2 * reserve, _TIGHT * room.limit)]
        self._tight_groups = [room.group for room in tight if room.group]

    def _still(self) -> bool:
        """Whether groups decide, pressure would be told, and their usage is about what it was at the last look."""
        told = self._pressure is not None and (self._pressure.events or not self._tight_groups)
        return (
            not self._news
            and self._ceiling is None
            and self._grouped
            and bool(told)
            and all(abs(gauge.left - gauge.looked) < self._near // 8 for gauge in self._gauges)
        )

    def _until_glance(self) -> float:
        """Seconds."""
        if not self._gauges:
            return _TICK
        return _FAR_GLANCE if all(gauge.left > 6 * self._near for gauge in self._gauges) else _GLANCE

    def _alarmed(self) -> bool:
        alarms = [gauge.alarmed(self._near) for gauge in self._gauges]
        return any(alarms)

    def _note_limits(self, found: Sequence[Room], now: float) -> None:
        """A limit that was raised or removed: what was tight before says nothing."""
        limits = {room.key: room.limit for room in found}
        if any(limits.get(key, 1 << 62) > limit for key, limit in self._limits.items()):
            self._ceiling, self._last_pressure, self._limits_moved = None, _NEVER, _NEVER
        elif self._limits and limits != self._limits:
            self._limits_moved = now
        self._limits = limits

    def _tightest(self, found: Sequence[Room], now: float) -> tuple[int, Room]:
        """The least that a limit leaves, beside the most that neighbours have held lately."""
        others = {room.key: room.others for room in found}
        if self._neighbours and now - self._neighbours[-1][0] < _TICK:
            last = self._neighbours[-1][1]
            last.update({key: max(held, last.get(key, 0)) for key, held in others.items()})
        else:
            self._neighbours.append((now, others))
        while self._neighbours[0][0] < now - _NEIGHBOURS:
            self._neighbours.popleft()
        most = {room.key: max(held.get(room.key, 0) for _, held in self._neighbours) for room in found}
        left = {room.key: max(0, room.limit - most[room.key]) for room in found}
        tightest = min(found, key=lambda room: left[room.key])
        return left[tightest.key], tightest

    @staticmethod
    def _reserve(room: int, sessions: Sequence[Session], rise: int | None = None) -> int:
        return max((session.reserve(room, rise) for session in sessions), default=0)

    def _fixed(self, sessions: Sequence[Session], reserve: int, measured: int, soon: int | None = None) -> int:
        """What the process takes beside flash, see beside_flash."""
        # what was there before the first model may be gone since
        rest = measured - sum(session.certain for session in sessions)
        self._interpreter = min(self._interpreter, max(0, rest))
        planned = self._interpreter + sum(session.fixed for session in sessions)
        return beside_flash(planned, measured, reserve, soon)

    def _note_pressure(self, now: float, sessions: Sequence[Session], touched: int, reason: str) -> bool:
        if self._pressure is not None and self._pressure.poll(now, self._tight_groups):
            self._pressed = True
        pressed, self._pressed = self._pressed, False
        granted = sum(session.granted for session in sessions)
        if pressed:
            in_use = min(granted, touched)  # what is granted and not used frees nothing
            ceiling = in_use - max(_STEP_MIN, _STEP_SHARE * in_use)
            still = self._ceiling is not None and touched > self._ceiling and now - self._last_pressure < _SOON
            if not still:  # else what was decided before is still being given back
                self._ceiling = ceiling
            self._last_pressure = now
            for session in sessions:
                self._note(session, "pressure", session.granted, session.granted, reason)
        elif self._ceiling is not None and now - self._last_pressure < _AFTERMATH:
            # a lower limit is accepted the moment usage is below it: it must not find us with nothing to spare
            self._ceiling -= max(_STEP_MIN, _STEP_SHARE * self._ceiling) / 4
        elif self._ceiling is not None and now - self._last_pressure > _CALM:
            self._ceiling += max(_STEP_MIN, _REGROWTH * self._ceiling) * _TICK
            if self._ceiling > sum(session.most for session in sessions):
                self._ceiling = None
        return pressed

    def _move(self, session: Session, n_bytes: int, reason: str, urgent: bool = False) -> None:
        n_bytes = min(max(n_bytes, session.least), session.most)
        before = session.granted
        if n_bytes == before:
            return
        self._unsettled = not session.move(n_bytes, urgent) or self._unsettled
        logger.debug("flash memory: %s to %s (%s)", format_size(before), format_size(n_bytes), reason)
        self._note(session, "shrink" if n_bytes < before else "grow", before, n_bytes, reason)

    def _note(self, session: Session, kind: EventKind, before: int, after: int, reason: str) -> None:
        self._events.append((session, FlashEvent(kind, before, after, reason, time.time())))

    def _finish(self, seconds: float = 5.0) -> None:
        """Goes on until all sessions have arrived."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            arrived = [session.move(session.granted, False) for session in self._sessions()]
            if all(arrived):
                return
            time.sleep(_BUSY_TICK)


_the_controller = Controller()


@atexit.register
def _at_exit() -> None:
    _the_controller.stop()


def _after_fork() -> None:
    """The sessions are the parent's, and so is the thread."""
    global _the_controller
    before, _the_controller = _the_controller, Controller()
    with contextlib.suppress(OSError):
        before._close_files()


os.register_at_fork(after_in_child=_after_fork)
