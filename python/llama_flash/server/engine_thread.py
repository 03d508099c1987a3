"""llama-server in a thread of its own: its start, whether it answers, and its end. One at a time in a process.

Whoever starts it watches it and ends it: `llama-flash serve` (engine_server.py) from the main thread, a batch from any.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import signal
import sys
import threading
import time
from types import FrameType

from ..errors import FlashError, FlashWorkerError
from ..native import server as native
from .address import connection_to
from .driver import EngineDriver
from .pages import FlashPages
from .prompts import ServerPrompts

__all__ = ["LOOK", "EngineThread", "Signals"]

LOOK = 0.1  # seconds between two looks at signals
PATIENCE = 10.0  # seconds that the end may take
_TELLING = 0.5  # seconds in which calls that have failed are told to those who wait for them
# llama-server's own settings: of memory that nobody has counted, of keys, of the port
_ENVIRONMENT = ("LLAMA_ARG_", "LLAMA_API_KEY", "LLAMA_SERVER_", "AIP_")

_one = threading.Lock()  # held while a server runs: its hooks and its end are the process'


class Signals:
    """Notes SIGTERM and SIGINT. The process ends at once if there is nothing to wait for, or with the second one."""

    def __init__(self) -> None:
        self.last = 0
        self.may_wait = False

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.last or not self.may_wait:
            self.end_process(number)
        self.last = number

    @staticmethod
    def end_process(number: int) -> None:
        """Without the interpreter's own end, which a thread inside the engine would be in the way of."""
        sys.stderr.flush()
        os._exit(128 + number)

    def raise_last(self) -> None:
        """Raises KeyboardInterrupt for SIGINT, SystemExit for SIGTERM."""
        if self.last == signal.SIGINT:
            raise KeyboardInterrupt
        if self.last:
            sys.exit(128 + self.last)


class EngineThread:
    """A server that is started, watched and ended from outside.

    Args:
        arguments: of llama-server.
        host, port: where it will listen, as `arguments` say; a host that ends in ".sock" is a socket's path.
        prompts: who keeps the state of prompts; None: nobody.
        holds: who says when prompts begin; None: at once.
    """

    def __init__(
        self,
        arguments: list[str],
        driver: EngineDriver,
        pages: FlashPages,
        limits: native.RequestLimits,
        host: str,
        port: int,
        prompts: ServerPrompts | None = None,
        holds: native.Holds | None = None,
    ) -> None:
        self._prompts, self._holds = prompts, holds
        self._arguments, self._driver, self._pages, self._limits = arguments, driver, pages, limits
        self._host, self._port = host, port
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="llama-server", daemon=True)

    def start(self) -> None:
        """Raises FlashError if one runs in this process already."""
        if not _one.acquire(blocking=False):
            raise FlashError("a server runs in this process already; close it, or start this one in another process")
        for name in [name for name in os.environ if name.startswith(_ENVIRONMENT)]:
            del os.environ[name]
        self._thread.start()

    def _run(self) -> None:
        try:
            driver, more = self._driver, (self._prompts, self._driver.drafts, self._holds)
            if native.serve(self._arguments, driver, self._pages, self._limits, *more) != 0:
                self._failure = self._driver.failure or FlashError("the server did not start: --verbose shows its log")
        except BaseException as failure:
            self._failure = failure
        finally:
            if self._prompts is not None:
                self._prompts.close()
            self._driver.close()
            _one.release()

    @property
    def runs(self) -> bool:
        return self._thread.is_alive()

    @property
    def loss(self) -> FlashWorkerError | None:
        """See EngineDriver."""
        return self._driver.loss

    def wait_until_it_answers(self) -> bool:
        """False if it ends before."""
        while self._thread.is_alive():
            if self._answers():
                return True
            self._thread.join(LOOK)
        return False

    def watch(self, signals: Signals) -> FlashWorkerError | None:
        """Until it ends, a signal comes, or a worker is lost: why, after a moment in which clients are told so."""
        loss = None
        while self._thread.is_alive() and not signals.last and loss is None:
            self._thread.join(LOOK)
            loss = self._driver.loss
        if loss is not None:
            self._thread.join(_TELLING)
        return loss

    def end(self, signals: Signals, slowest: float = 0.0) -> None:
        """Tells it to end and waits for that. If it takes too long, the process is ended.

        Args:
            slowest: seconds for which clients may hold it up beside; not after a signal.
        """
        end = time.monotonic() + slowest
        while not self.stop():
            if signals.last:
                signals.end_process(signals.last)
            if time.monotonic() > end:
                print("the server does not end: its clients hold it up", file=sys.stderr, flush=True)
                os._exit(1)

    def stop(self, patience: float = PATIENCE) -> bool:
        """Tells it to end, as soon as it answers, and waits for that. False if it took longer than `patience`."""
        end = time.monotonic() + patience if patience < math.inf else math.inf
        while self._thread.is_alive():
            if self._answers():  # else its end has begun
                native.stop()
            self._thread.join(1.0)
            if time.monotonic() > end:
                return False
        return True

    def raise_failure(self) -> None:
        """When it has ended: what ended it, if that was a failure."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _answers(self) -> bool:
        """Whether its model is loaded."""
        connection = connection_to(self._host, self._port, timeout=1.0)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False
