"""llama-server for one job, on a socket in a folder that nobody else may enter: no port and no key is needed."""

from __future__ import annotations

import contextlib
import http.client
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FlashError
from ..model.gguf import read_gguf
from ..native.library import trim_heap
from ..server.address import SOCKET, connection_to
from ..server.driver import EngineDriver
from ..server.engine_server import arguments_of, completed
from ..server.engine_settings import EngineSettings
from ..server.engine_thread import EngineThread
from ..server.limits import Limits
from ..server.pages import FlashPages
from ..whole_files import temporary_folder
from .company import Company

__all__ = ["N_BATCH", "Engine", "in_flight"]

N_BATCH = 4096  # tokens of prompts that begin together; nobody waits for the next token meanwhile
_LONGEST = 100  # bytes of a socket's path: 107 is what the system allows
# no stranger asks
_NONE = Limits(max_body=1 << 30, max_grammar=1 << 30, max_memory=1 << 50, max_requests=1 << 20, timeout=3600)
_INSIDE: dict[str, Any] = {"page": False, "limits": _NONE, "n_batch": N_BATCH}
# a sequence that has begun another prompt alike is only looked for where most of it is: else they begin in their order
_SIDE_BY_SIDE = ("--slot-prompt-similarity", "0.5")
_QUEUED = 8  # requests beyond those computed, so that no sequence waits for the next one


def in_flight(parallel: int) -> int:
    """Requests under way at the same time, for so many sequences."""
    return parallel + min(parallel, _QUEUED)


class Engine:
    """A server that answers when this has been made. To be closed.

    Args:
        model: GGUF file, or its first shard.
        say: is told about the model when it is loaded.
        settings: the rest of EngineSettings.

    Raises:
        FlashError, OSError, ValueError: see llama_cpp.Llama.
        FlashError: a server runs in this process already.
    """

    def __init__(self, model: Path, parallel: int, say: Callable[[str], None], **settings: Any) -> None:
        with contextlib.ExitStack() as stack:
            place = Path(tempfile.gettempdir(), "llama-flash-batch")
            folder = stack.enter_context(temporary_folder(place, say=lambda line: None))  # of a killed run: a socket
            self._socket = str(folder / f"s{SOCKET}")
            if len(self._socket.encode()) > _LONGEST:
                raise FlashError(f"{folder}: too long for the path of a socket: set TMPDIR to a shorter one")
            name = model.name.removesuffix(".gguf")
            asked = completed(
                EngineSettings(model, name, threads_http=in_flight(parallel) + 4, **_INSIDE, **settings),
                read_gguf(model),
            )
            driver = EngineDriver(asked.flash_offload, lambda session: say(session.summary))
            arguments = [*arguments_of(asked, parallel, self._socket, 0), *_SIDE_BY_SIDE]
            pages, limits = FlashPages(name, parallel), asked.limits.of_requests(asked.n_ctx or 0)
            holds = Company(parallel) if parallel > 1 else None
            self._thread = EngineThread(arguments, driver, pages, limits, self._socket, 0, holds=holds)
            self._thread.start()
            stack.callback(self._thread.stop, math.inf)
            if not self._thread.wait_until_it_answers():
                self._thread.raise_failure()
                raise FlashError("the server ended before it answered")
            self._end = stack.pop_all()

    def connect(self) -> http.client.HTTPConnection:
        """A new connection, which waits as long as an answer takes."""
        return connection_to(self._socket, 0, None)

    @property
    def runs(self) -> bool:
        return self._thread.runs

    def raise_failure(self) -> None:
        """If it has ended by itself, or cannot compute any more: why."""
        if not self._thread.runs:
            self._thread.raise_failure()
        self.raise_loss()

    def raise_loss(self) -> None:
        """Raises FlashWorkerError if a worker is lost: what was not answered with status 200 has no answer."""
        if (loss := self._thread.loss) is not None:
            raise loss

    def close(self) -> None:
        """Ends answers under way and frees the model's memory; waits for that."""
        self._end.close()
        trim_heap()
