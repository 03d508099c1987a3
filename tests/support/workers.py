"""Workers as they are run: processes of `llama-flash worker` at loopback."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_flash import FlashOffload

__all__ = [
    *("DENSE", "MOE", "PROMPT", "Proxy", "WorkerProcess"),
    *("least_budget", "logits_of", "open_model", "workers_of"),
]

MOE = Path(__file__).parents[2] / "python/llama_flash/models/stdlib-moe-q8_0.gguf"
DENSE = MOE.with_name("stdlib-arcee-q8_0.gguf")
PROMPT = b"def read_lines(path):\n    with open(path) as f:\n        return"
BUDGET = "160MiB"  # enough for a worker of the small models, its interpreter included

_READY = re.compile(rb" at (127\.0\.0\.1:\d+), ")
_STARTING, _ENDING = 400.0, 200.0  # seconds: a busy machine is not a failure


class WorkerProcess:
    """One, at a port of its own. What it says is in `said()`."""

    def __init__(
        self, model: Path, folder: Path, *arguments: str, budget: str = BUDGET, port: int = 0, waits: bool = True
    ) -> None:
        self.log = folder / f"worker-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "llama_flash", "worker", str(model), "--dram-budget", budget]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--listen", f"127.0.0.1:{port}", *arguments], stdout=log, stderr=log
            )
        self.endpoint = ""
        if waits:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        end = time.monotonic() + _STARTING
        while not (ready := _READY.search(self.log.read_bytes())):
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.02)
        self.endpoint = ready[1].decode()

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until_said(self, text: str) -> None:
        end = time.monotonic() + _STARTING
        while text not in self.said():
            assert time.monotonic() < end, f"it never said {text!r}: {self.said()}"
            time.sleep(0.02)

    def guest(self) -> int:
        """Process id of the one that serves the client."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        end = time.monotonic() + _STARTING
        while True:
            # its threads may have started it
            found = [int(pid) for task in path.parents[1].iterdir() for pid in (task / "children").read_text().split()]
            if found:
                return found[0]
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Returns its exit code."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self.process.wait(_ENDING)


@contextmanager
def workers_of(
    model: Path, folder: Path, n: int = 2, *arguments: str, **settings: Any
) -> Iterator[list[WorkerProcess]]:
    """So many workers of a model, ended at the end."""
    started: list[WorkerProcess] = []
    try:
        for _ in range(n):
            started.append(WorkerProcess(model, folder, *arguments, waits=False, **settings))
        for worker in started:
            worker.wait_until_ready()
        yield started
    finally:
        for worker in started:
            worker.process.send_signal(signal.SIGCONT)
            worker.process.send_signal(signal.SIGTERM)
        for worker in started:
            worker.process.wait(_ENDING)


def open_model(path: Path, workers: Sequence[WorkerProcess | str] = (), flash: bool = True, **options: Any) -> Any:
    """A Llama; without workers and flash as stock."""
    import llama_cpp

    offload = (
        FlashOffload(workers=[w if isinstance(w, str) else w.endpoint for w in workers], **options) if flash else False
    )
    return llama_cpp.Llama(str(path), flash_offload=offload, n_ctx=512, n_threads=2, logits_all=True, verbose=False)


_least: dict[tuple[object, ...], int] = {}  # what was found by this process


def least_budget(model: Path, folder: Path, n: int = 2, **options: Any) -> int:
    """MiB that each of so many workers needs, as their refusals say. How much of its libraries a process holds depends
    on the machine."""
    key = (model, n, *sorted(options.items()))
    if key not in _least:
        _least[key] = _least_budget(model, folder, n, **options)
    return _least[key]


def _least_budget(model: Path, folder: Path, n: int, **options: Any) -> int:
    from llama_flash import FlashBudgetError, FlashWorkerError

    mib = 64
    for _ in range(6):
        with workers_of(model, folder, n, budget=f"{mib}MiB") as workers:
            try:
                open_model(model, workers, **options).close()
                return mib
            except (FlashBudgetError, FlashWorkerError) as error:
                found = re.search(r"about (\d+)[.\d]* MiB would do", str(error))
                assert found, error
                mib = max(mib, int(found[1])) + 1
    raise AssertionError(f"{mib} MiB are too little, too")


def logits_of(llm: Any, n: int = 8, prompt: bytes = PROMPT) -> npt.NDArray[np.uint32]:
    """Bits of all logits of a prompt, from the beginning, and of the n likeliest tokens after it."""
    llm.reset()
    llm.eval(llm.tokenize(prompt))
    for _ in range(n):
        llm.eval([int(np.argmax(llm.scores[llm.n_tokens - 1]))])
    return np.array(llm.scores[: llm.n_tokens]).view(np.uint32)


class Proxy:
    """Between a client and a worker: counts the bytes that cross by connection, and can cut or hold them."""

    def __init__(self, endpoint: str) -> None:
        self._to = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.up: list[int] = []  # by connection, from the client to the worker
        self.down: list[int] = []
        self.cut_after: int | None = None  # bytes from now on, both ways together
        self.held, self.data_held = threading.Event(), threading.Event()  # nothing is passed on while not set
        self.held.set()
        self.data_held.set()  # of all connections but the first, which is the control channel
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            worker = socket.create_connection(self._to)
            for one in (client, worker):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open += [client, worker]
            number = len(self.up)
            self.up.append(0)
            self.down.append(0)
            threading.Thread(target=self._pass, args=(client, worker, self.up, number), daemon=True).start()
            threading.Thread(target=self._pass, args=(worker, client, self.down, number), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, counts: list[int], number: int) -> None:
        with suppress(OSError):
            while piece := one.recv(1 << 16):
                self.held.wait()
                if number > 0:
                    self.data_held.wait()
                if self.cut_after is not None:
                    piece = piece[: self.cut_after]
                    self.cut_after -= len(piece)
                counts[number] += len(piece)
                other.sendall(piece)
                if self.cut_after == 0:
                    self.cut()
        with suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """All connections, at once."""
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
        self.held.set()
        self.data_held.set()
        self.cut()
