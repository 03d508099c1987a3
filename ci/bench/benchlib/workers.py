"""A model over workers beside one machine: tokens per second of one and of four clients, in turns; the same answers.

Each worker is a process below a memory cap of its own, and so is each server. All are on this machine: cores and disk
are one host's for whichever of them computes. A link is a proxy that lets every byte wait, and counts them.
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchlib.many import Served
from benchlib.models import DENSE_GQA, MOE_SKEWED, BenchModel
from benchlib.stock import Outcome, run_stock
from benchlib.turns import BuildError

_CAP = 0.28  # of the file: 1.2 GB of 4.3
_LEAST_CAP = 400 << 20
_N_CTX = 256  # of each sequence
CLIENTS = (1, 4)
_TARGET = 1.6  # tokens per second of four over those of one
_TURN = 3.0  # seconds, about
_PATIENCE = 300.0  # seconds
_PULSE = 1.2  # seconds after which a server has heard what its workers have read
_READ = re.compile(r"^llama_flash_(?:worker_)?read_bytes_total\{.*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Way:
    """How a model is run."""

    name: str
    caps: float = 1.0  # memory of the one machine, in caps
    workers: int = 0  # 0: one machine; else so many, each with a cap
    delay: float | None = None  # seconds that the link takes each way; None: without a proxy


_ALONE = (Way("one machine, a cap"), Way("one machine, two caps", caps=2.0))
_TWO = Way("two workers", workers=2)
WAYS: tuple[tuple[BenchModel, tuple[Way, ...]], ...] = (
    (
        MOE_SKEWED,
        (
            *_ALONE,
            _TWO,
            Way("three workers", workers=3),
            Way("two workers, 0 ms", workers=2, delay=0.0),
            Way("two workers, 1 ms", workers=2, delay=0.001),
            Way("two workers, 10 ms", workers=2, delay=0.010),
        ),
    ),
    (DENSE_GQA, (*_ALONE, _TWO)),
)


class Link:
    """A way to a worker on which every byte takes `delay` seconds, in each direction."""

    def __init__(self, endpoint: str, delay: float) -> None:
        self._to, self._delay = ("127.0.0.1", int(endpoint.rpartition(":")[2])), delay
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.n_bytes = 0  # both ways
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                one, _ = self._socket.accept()
                other = socket.create_connection(self._to)
                for end in (one, other):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for ends in ((one, other), (other, one)):
                    under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                    threading.Thread(target=self._receive, args=(ends[0], under_way), daemon=True).start()
                    threading.Thread(target=self._send, args=(ends[1], under_way), daemon=True).start()

    def _receive(self, source: socket.socket, under_way: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        piece = b"begins"
        while piece:
            try:
                piece = source.recv(1 << 16)
            except OSError:
                piece = b""
            self.n_bytes += len(piece)
            under_way.put((time.monotonic() + self._delay, piece))

    def _send(self, target: socket.socket, under_way: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, piece = under_way.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not piece:
                    target.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(piece)


class Host:
    """A worker below a memory cap. Raises BuildError: it did not start."""

    def __init__(self, model: Path, cap: int, log: Path) -> None:
        command = [sys.executable, "-m", "llama_flash", "cap", str(cap), "--"]
        command += [sys.executable, "-m", "llama_flash", "worker", str(model), "--listen", "127.0.0.1:0"]
        self._log = log
        with log.open("w") as to:
            self.process = subprocess.Popen(command, stdout=to, stderr=to)
        end = time.monotonic() + _PATIENCE
        while not (found := re.search(r" at (127\.0\.0\.1:\d+), ", self.said())):
            if self.process.poll() is not None or time.monotonic() > end:
                raise BuildError(f"a worker did not start: {self.said()[-500:]}")
            time.sleep(0.05)
        self.endpoint = found[1]

    def said(self) -> str:
        return self._log.read_text()

    def close(self) -> str:
        """What the cap says at the end: the peak of memory, and who was killed for it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        return self.said().strip().rpartition("\n")[2]


class Run:
    """A server that has come to serving, with its workers. To be closed."""

    def __init__(self, way: Way, model: Path, cap: int, folder: str) -> None:
        self.links: list[Link] = []
        self.peaks: list[str] = []  # when it was closed
        with contextlib.ExitStack() as stack:
            endpoints = []
            for i in range(way.workers):
                host = Host(model, cap, Path(folder) / f"{way.name}-{i}.worker")
                stack.callback(self._end_host, host)
                endpoints.append(host.endpoint)
                if way.delay is not None:
                    self.links.append(stack.enter_context(contextlib.closing(Link(host.endpoint, way.delay))))
                    endpoints[-1] = self.links[-1].endpoint
            flash: dict[str, Any] | None = {"workers": endpoints} if endpoints else None
            self.server = Served(model, max(CLIENTS), int(cap * way.caps), folder, flash, _N_CTX)
            stack.enter_context(contextlib.closing(self.server))
            self._has_workers = bool(endpoints)
            self._n_read = 0
            self._end = stack.pop_all()

    def close(self) -> None:
        self._end.close()

    def _end_host(self, host: Host) -> None:
        self.peaks.append(host.close())

    def turn(self, n_clients: int, n_tokens: int) -> tuple[float, int, int]:
        """Tokens per second, bytes read from flash and bytes that have crossed, of all together."""
        before, crossed = self._n_read, sum(link.n_bytes for link in self.links)
        speed, _ = self.server.turn(n_clients, n_tokens)
        crossed = sum(link.n_bytes for link in self.links) - crossed
        self._n_read = self._read()
        return speed, self._n_read - before, crossed

    def _read(self) -> int:
        """Bytes since the load, by the server and its workers, which does nothing else meanwhile."""
        if self._has_workers:
            time.sleep(_PULSE)
        with contextlib.closing(http.client.HTTPConnection(*self.server.address, timeout=_PATIENCE)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return int(sum(map(float, _READ.findall(text))))

    def answer(self) -> Any:
        """A short one, with the probabilities of the likeliest tokens."""
        body = {"prompt": [10, 11, 12], "n_predict": 8, "temperature": 0.0, "n_probs": 100, "ignore_eos": True}
        told = self.server.ask({**body, "cache_prompt": False})["completion_probabilities"]
        return [[(one["id"], one["logprob"]) for one in each["top_logprobs"]] for each in told]


@dataclass
class Result:
    """Of one model: by way and number of clients."""

    model: str
    cap: int  # bytes
    speeds: dict[str, dict[int, list[float]]] = field(default_factory=dict)  # tokens per second of all, of each turn
    read: dict[str, dict[int, float]] = field(default_factory=dict)  # bytes from flash per token
    crossed: dict[str, dict[int, float]] = field(default_factory=dict)  # bytes on the network per token
    same: dict[str, bool] = field(default_factory=dict)  # whether answers are those of one machine, to the bit
    peaks: dict[str, list[str]] = field(default_factory=dict)  # of the workers
    stock: Outcome | None = None  # two workers of the engine's own below the same caps

    def ratio(self, way: str, n: int, other: str, m: int) -> float:
        return statistics.median(self.speeds[way][n]) / statistics.median(self.speeds[other][m])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    folder: Path, seconds: float, report: Callable[[str], None], *, keep: bool = False, layers: int | None = None
) -> Iterator[Result]:
    """A mixture and a dense model; so many seconds of turns with each.

    Args:
        layers: of each model; None: all.

    Raises:
        OSError: the disk has no room for a model.
        BuildError: a server or a worker did not start, or refused.
    """
    for model, ways in WAYS:
        files = model.ensure(folder, layers)
        try:
            yield _measure(model, files.flash, ways, seconds, report)
        finally:
            if not keep:
                files.remove()


def _measure(
    model: BenchModel, path: Path, ways: Sequence[Way], seconds: float, report: Callable[[str], None]
) -> Result:
    result = Result(model.name, max(_LEAST_CAP, int(path.stat().st_size * _CAP)))
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as logs, contextlib.ExitStack() as running:
        report(f"{model.name}: two stock workers")
        result.stock = run_stock(path, result.cap, logs)
        for way in ways:
            report(f"{model.name}: loading, {way.name}")
            runs[way.name] = running.enter_context(contextlib.closing(Run(way, path, result.cap, logs)))
        answers = {name: run.answer() for name, run in runs.items()}
        result.same = {name: answer == answers[ways[0].name] for name, answer in answers.items()}
        _take_turns(result, runs, seconds, report)
        running.close()
        result.peaks = {name: run.peaks for name, run in runs.items() if run.peaks}
    return result


def _take_turns(result: Result, runs: dict[str, Run], seconds: float, report: Callable[[str], None]) -> None:
    turns = [(name, n) for name in runs for n in CLIENTS]
    tokens: dict[tuple[str, int], int] = {}
    counted = {turn: [0, 0, 0] for turn in turns}  # tokens, bytes read, bytes that have crossed
    for name, n in turns:
        report(f"warming up, {name}, {n} clients")
        speed = [runs[name].turn(n, 4)[0] for _ in range(2)][-1]
        tokens[name, n] = min(_N_CTX - 8, max(8, round(_TURN * speed / n)))
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end or rounds < 2:
        rounds += 1
        random.shuffle(turns)
        for name, n in turns:
            report(f"{max(0.0, end - time.monotonic()):.0f} s left, {name}, {n} clients")
            speed, n_read, n_crossed = runs[name].turn(n, tokens[name, n])
            result.speeds.setdefault(name, {}).setdefault(n, []).append(speed)
            told = n * tokens[name, n]
            counted[name, n] = [a + b for a, b in zip(counted[name, n], (told, n_read, n_crossed), strict=True)]
    for (name, n), (told, n_read, n_crossed) in counted.items():
        result.read.setdefault(name, {})[n] = n_read / told
        result.crossed.setdefault(name, {})[n] = n_crossed / told


def table(result: Result) -> Table:
    shown = Table(
        title=f"{result.model}, caps of {result.cap / 1e9:.2f} GB: tok/s of all clients", title_justify="left"
    )
    for column in ("way", "1 client", "4 clients", "4 over 1", "MB read a token", "kB crossed a token", "same bits"):
        shown.add_column(column, justify="left" if column == "way" else "right")
    for name, speeds in result.speeds.items():
        read = ", ".join(f"{result.read[name][n] / 1e6:.1f}" for n in CLIENTS)
        crossed = ", ".join(f"{result.crossed[name][n] / 1e3:.1f}" for n in CLIENTS) if result.crossed[name][1] else "-"
        spread = [f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in (speeds[n] for n in CLIENTS)]
        ratio = f"{result.ratio(name, 4, name, 1):.2f}"
        shown.add_row(name, *spread, ratio, read, crossed, "yes" if result.same[name] else "NO")
    gain = result.ratio(_TWO.name, 4, _TWO.name, 1)
    verdict = "yes" if gain >= _TARGET else "no"
    lines = [f"two workers, 4 clients over 1: {gain:.2f} (at least {_TARGET:g}: {verdict})"]
    if result.stock is not None:
        lines += [f"two stock workers: the client ended with {result.stock.client}"]
        lines += [f"two stock workers: {said}" for said in result.stock.workers]
    lines += [f"{name}: {peak}" for name, peaks in result.peaks.items() for peak in peaks]
    shown.caption, shown.caption_justify = "\n".join(lines), "left"
    return shown
