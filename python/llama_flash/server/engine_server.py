"""llama-server in this process: what it is told, its start, and its end when a signal comes.

    flags  ->  EngineSettings  ->  arguments of llama-server
    signal  ->  main thread  ->  stop;  the server's thread  ->  driver.py  ->  FlashSession

docs/explanation/serving.md says why it is told what it is told. Needs no package but those of llama_flash.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ..budget.cores import default_threads
from ..errors import FlashError
from ..model.gguf import check_vocabulary, read_gguf
from ..native import server as native
from .address import bound, is_loopback
from .driver import EngineDriver

__all__ = ["EngineSettings", "serve_engine"]

_CELLS = 256  # the engine makes the context of a sequence a multiple of it
_BATCH = 512  # tokens of a pass: what neighbours wait for at most while a prompt is computed
_LOOK = 0.1  # seconds between two looks at signals
_PATIENCE = 10.0  # seconds that the end may take
_ENVIRONMENT = ("LLAMA_ARG_", "AIP_")  # llama-server's own settings: of memory that nobody has counted, of the port


@dataclass(frozen=True)
class EngineSettings:
    """What is served, and how.

    Attributes:
        n_ctx: tokens of each sequence; None: 2048, or fewer if the model was trained so.
        parallel: sequences that are computed at the same time, at most.
        threads: None: as many as may run.
        flash_offload: options of FlashOffload.
    """

    model: Path
    alias: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    parallel: int = 4
    n_ctx: int | None = None
    threads: int | None = None
    flash_offload: Mapping[str, Any] = field(default_factory=dict)
    verbose: bool = False


def serve_engine(settings: EngineSettings, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM (then SystemExit is raised) or SIGINT (KeyboardInterrupt). To be called by the main thread.

    Args:
        say: is told what the user should know, a line at a time, from another thread too.

    Raises:
        OSError: the address cannot be listened at.
        FlashError, ValueError: see llama_cpp.Llama.
    """
    if settings.api_key == "":
        raise ValueError("--api-key: an empty key would let everybody in")
    n_ctx = _context(settings)
    with bound(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
    if not is_loopback(host) and settings.api_key is None:
        say(f"warning: whoever reaches {host} can use this server; set an API key (--api-key)")
    say(f"loading {settings.alias}")
    for name in [name for name in os.environ if name.startswith(_ENVIRONMENT)]:
        del os.environ[name]
    driver = EngineDriver(dict(settings.flash_offload) or True, lambda session: say(session.summary))
    server = _Server(_arguments(settings, n_ctx, host, port), driver, host, port)
    with _Signals() as signals:
        server.start()
        if server.wait_until_it_answers():
            signals.may_wait = True
            address = f"[{host}]" if ":" in host else host
            say(f"serving http://{address}:{port}/v1 (Ctrl-C ends it)")
            server.run_until(signals)
        server.raise_failure()
        signals.raise_last()


def _context(settings: EngineSettings) -> int:
    """Tokens of each sequence. Raises FlashFormatError, OSError for what is no model."""
    meta = read_gguf(settings.model)
    check_vocabulary(meta)
    n_ctx = settings.n_ctx or min(2048, meta.number("context_length", 2048))
    return -(-n_ctx // _CELLS) * _CELLS


def _arguments(settings: EngineSettings, n_ctx: int, host: str, port: int) -> list[str]:
    """Of llama-server. What takes memory is named, so that its defaults do not decide."""
    threads = str(settings.threads or default_threads())
    key = [] if settings.api_key is None else ["--api-key", _quoted(settings.api_key)]
    return [
        *("--model", str(settings.model), "--alias", settings.alias),
        *("--host", host, "--port", str(port), *key),
        *("--parallel", str(settings.parallel), "--ctx-size", str(n_ctx * settings.parallel), "--no-kv-unified"),
        *("--batch-size", str(_BATCH), "--ubatch-size", str(_BATCH), "--flash-attn", "off"),
        *("--fit", "off", "--cache-ram", "0", "--ctx-checkpoints", "0"),
        *("--threads", threads, "--threads-batch", threads),
        # /slots would show what others ask, and a page in a browser needs no server on loopback
        *("--no-warmup", "--no-ui", "--offline", "--metrics", "--no-slots", "--cors-origins", "localhost"),
        *("--log-verbosity", "3" if settings.verbose else "0"),
    ]


def _quoted(value: str) -> str:
    """One value, for llama-server's options that take several with commas between them."""
    return '"' + value.replace('"', '""') + '"'


class _Signals:
    """Notes SIGTERM and SIGINT. The process ends at once if there is nothing to wait for, or with the second one."""

    def __init__(self) -> None:
        self.last = 0
        self.may_wait = False

    def __enter__(self) -> _Signals:
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
        if self.last == signal.SIGINT:
            raise KeyboardInterrupt
        if self.last:
            sys.exit(128 + self.last)


class _Server:
    """llama-server in a thread of its own. The main thread starts it, watches it and ends it."""

    def __init__(self, arguments: list[str], driver: EngineDriver, host: str, port: int) -> None:
        self._arguments, self._driver, self._host, self._port = arguments, driver, host, port
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="llama-server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            if native.serve(self._arguments, self._driver) != 0:
                self._failure = self._driver.failure or FlashError("the server did not start: --verbose shows its log")
        except BaseException as failure:
            self._failure = failure
        finally:
            self._driver.close()

    def wait_until_it_answers(self) -> bool:
        """False if it ends before."""
        while self._thread.is_alive():
            if self._answers():
                return True
            self._thread.join(_LOOK)
        return False

    def run_until(self, signals: _Signals) -> None:
        """Until it ends, which it is told to when a signal comes."""
        while self._thread.is_alive() and not signals.last:
            self._thread.join(_LOOK)
        end = time.monotonic() + _PATIENCE
        while self._thread.is_alive():
            if self._answers():  # else its end has begun
                native.stop()
            self._thread.join(1.0)
            if time.monotonic() > end:
                signals.end_process(signals.last)

    def raise_failure(self) -> None:
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _answers(self) -> bool:
        """Whether its model is loaded."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=1.0)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False
