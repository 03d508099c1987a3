"""llama-server until a signal comes. Where a worker of its model is lost, it ends, and is started again with it.

Meanwhile a stand-in answers at its address. What does not pass by itself, like a worker that came back with another
model, ends the server after a minute. Without workers, whatever ends a server ends this.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import FlashError, FlashWorkerError
from ..workers.wire import connect
from .engine_thread import LOOK, EngineThread, Signals
from .pages import FlashPages
from .stand_in import StandIn

__all__ = ["Recovery"]

_FIRST, _LONGEST = 0.5, 10.0  # seconds from a failure to the next load; twice as many after each
_TRIES = 10  # loads that may fail in a row for what somebody has to mend: about a minute
_KNOCKING = 1.0  # seconds that a connection may take


@dataclass(frozen=True)
class Recovery:
    """Of one server.

    Attributes:
        make: the server, not started.
        host, port: where it listens.
        key: of clients; None: nobody is asked for one.
        workers: of its model.
        slowest: seconds that it gives its clients, for which they can hold up its end.
        say: is told what the user should know, a line at a time.
    """

    make: Callable[[], EngineThread]
    pages: FlashPages
    host: str
    port: int
    key: str | None
    workers: Sequence[str]
    slowest: float
    say: Callable[[str], None]

    def run(self, signals: Signals) -> None:
        """Until SIGTERM (then SystemExit is raised) or SIGINT (KeyboardInterrupt).

        Raises:
            FlashError: what ended the first load, or a server without workers; what nobody has mended for a minute.
        """
        served, wait, tries = False, _FIRST, 0
        while True:
            server = self.make()
            failure: FlashError | None = None
            server.start()
            if server.wait_until_it_answers():
                served, wait, tries = True, _FIRST, 0
                signals.may_wait = True
                self.say(f"serving http://{self._address}/v1 (Ctrl-C ends it)")
                failure = server.watch(signals)
            if failure is None:
                server.end(signals)
                failure = self._failure_of(server, served)
            if failure is None:
                signals.raise_last()
                return
            passes = isinstance(failure, FlashWorkerError) and failure.is_away
            tries = 0 if passes else tries + 1
            if tries == _TRIES:
                raise failure
            ends = "" if passes else f", and the server ends after {_more(_TRIES - tries)}"
            with contextlib.closing(StandIn(self.host, self.port, str(failure), self.key, self.pages.metrics)):
                self.pages.unloaded()
                server.end(signals, self.slowest)
                self.say(f"{failure}; until then, requests are answered with status 503{ends}")
                signals.may_wait = True
                self._wait(signals, time.monotonic() + wait)
            signals.may_wait = False  # first: a signal in between would wait for the load
            signals.raise_last()
            wait = min(2 * wait, _LONGEST)

    @property
    def _address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def _failure_of(self, server: EngineThread, served: bool) -> FlashError | None:
        """Of a server that has ended: what may be over after a while. Raises what will not, or is the first load's."""
        try:
            server.raise_failure()
        except FlashError as failure:
            if not served or not self.workers:
                raise
            return failure
        return None

    def _wait(self, signals: Signals, end: float) -> None:
        """Until then at least, and until all workers can be reached; not after a signal."""
        while not signals.last and (time.monotonic() < end or not all(map(_is_there, self.workers))):
            time.sleep(LOOK)


def _is_there(worker: str) -> bool:
    try:
        connect(worker, _KNOCKING).close()
    except OSError:
        return False
    return True


def _more(n: int) -> str:
    return "one more load that fails" if n == 1 else f"{n} more loads that fail"
