"""Time to the first token of short requests: on a quiet server, and beside a client whose long prompts never end.

Each server has the model loaded below a cap that leaves room for half of its weights. Short requests arrive at random,
at the same times for each. The classic server answers one request at a time; `--against` names another build, of which
the same server is measured.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

import llama_flash
from benchlib import machine
from benchlib.turns import BuildError

# the dense model that is shipped: a pass of 512 tokens takes less than a second, so that there are many requests
_SHIPPED = Path(llama_flash.__file__).with_name("models") / "stdlib-arcee-q8_0.gguf"
_SHARE = 0.5  # of the file, beside the smallest budget
_PARALLEL = 4
_LONG, _SHORT, _ANSWER = 4000, 20, 8  # tokens
_N_CTX = 4352  # of each sequence
_EVERY = 1.5  # seconds between two short requests, on average
_PATIENCE = 900.0  # seconds
_WORDS = ("the", "house", "and", "a", "river", "near", "my", "old", "town")


@dataclass
class Result:
    """Seconds to the first token, of each short request, by server and situation."""

    model: str
    cap: int
    quiet: dict[str, list[float]] = field(default_factory=dict)
    beside: dict[str, list[float]] = field(default_factory=dict)
    long_prompts: dict[str, int] = field(default_factory=dict)  # that were answered meanwhile

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Served:
    """A server of its own process, which has come to serving.

    Raises:
        BuildError: it did not.
    """

    def __init__(self, name: str, python: str, arguments: list[str], cap: int, folder: str) -> None:
        command = [sys.executable, "-m", "llama_flash", "cap", str(cap), "--", python, "-m", "llama_flash", "serve"]
        self._log = Path(folder, f"{name}.log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen([*command, *arguments, "--port", "0"], stdout=log, stderr=log)
        end = time.monotonic() + _PATIENCE
        while not (found := re.search(r"serving http://([^/\s]+):(\d+)/", self._log.read_text())):
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                raise BuildError(f"{name}: {self._log.read_text().strip()[-500:]}")
            time.sleep(0.1)
        self._address = found[1], int(found[2])

    def first_token(self, prompt: str) -> float:
        """Seconds until it comes. The whole answer is taken."""
        body = {"prompt": prompt, "max_tokens": _ANSWER, "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection(*self._address, timeout=_PATIENCE)
        began, first = time.monotonic(), 0.0
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise BuildError(f"the server answers {answer.status}: {answer.read()[:300]!r}")
            for line in answer:
                if line.startswith(b'data: {"error"'):
                    raise BuildError(f"a stream ended with {line.decode(errors='replace')[:300]}")
                if line.startswith(b"data: {"):
                    first = first or time.monotonic() - began
        if not first:
            raise BuildError("a stream ended without a token")
        return first

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()


class _Prompts:
    """Texts of so many tokens, of which no two begin alike."""

    def __init__(self, model: Path) -> None:
        import llama_cpp

        self._vocabulary = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
        self._lock = threading.Lock()
        self._number = 0

    def of(self, n_tokens: int) -> str:
        with self._lock:
            self._number += 1
            dice = random.Random(self._number)
            words = [dice.choice(_WORDS) for _ in range(2 * n_tokens)]
            tokens = self._vocabulary.tokenize(" ".join([str(self._number), *words]).encode(), add_bos=False)
            text: bytes = self._vocabulary.detokenize(tokens[:n_tokens])
            return text.decode(errors="ignore")


def measure(
    folder: Path, seconds: float, against: str | None, report: Callable[[str], None], *, keep: bool = False
) -> Iterator[Result]:
    """So many seconds of each situation with each server.

    Args:
        against: Python of another build's environment, in place of the classic server.

    Raises:
        OSError: the disk has no room for the model.
        BuildError: a server did not start, or refused.
    """
    model = _longer(folder)
    smallest = llama_flash.plan(model, n_ctx=_N_CTX, parallel=_PARALLEL).smallest
    cap = smallest + int(_SHARE * model.stat().st_size)
    many = [str(model), "-c", str(_N_CTX), "--parallel", str(_PARALLEL)]
    servers = {"serve": (sys.executable, many)}
    if against:
        servers["serve of the other build"] = (against, many)
    else:
        servers["serve --classic"] = (sys.executable, [str(model), "-c", str(_N_CTX), "--classic"])
    result = Result(model.name, cap)
    prompts = _Prompts(model)
    try:
        with tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as logs:
            for name, (python, arguments) in servers.items():
                machine.drop_caches(model)
                report(f"{name}: loading")
                with contextlib.closing(_Served(name.replace(" ", "-"), python, arguments, cap, logs)) as server:
                    for _ in range(2):
                        server.first_token(prompts.of(_SHORT))
                    report(f"{name}: quiet")
                    result.quiet[name] = _arrivals(server, prompts, seconds / 2)
                    report(f"{name}: beside a long prompt")
                    with _long_prompts(server, prompts) as answered:
                        result.beside[name] = _arrivals(server, prompts, seconds)
                    result.long_prompts[name] = len(answered)
    finally:
        if not keep:
            model.unlink()
    yield result


def _longer(folder: Path) -> Path:
    """A copy of the shipped model that takes longer prompts than it was trained for. What it says is of no matter."""
    data = bytearray(_SHIPPED.read_bytes())
    key = b".context_length"
    at = data.index(key) + len(key)
    assert struct.unpack_from("<I", data, at)[0] == 4, "a number of 32 bits"
    struct.pack_into("<I", data, at + 4, 2 * _N_CTX)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"longer-{_SHIPPED.name}"
    path.write_bytes(data)
    return path


def _arrivals(server: _Served, prompts: _Prompts, seconds: float) -> list[float]:
    """Times to the first token, of requests that come at random for so long."""
    dice = random.Random(1)
    began, at, waiting = time.monotonic(), 0.0, []
    with ThreadPoolExecutor(256) as pool:
        while (at := at + dice.expovariate(1 / _EVERY)) < seconds:
            prompt = prompts.of(_SHORT)
            time.sleep(max(0.0, began + at - time.monotonic()))
            waiting.append(pool.submit(server.first_token, prompt))
        return [each.result() for each in waiting]


@contextlib.contextmanager
def _long_prompts(server: _Served, prompts: _Prompts) -> Iterator[list[float]]:
    """One after the other, as long as the block runs; the seconds to the first token of those that were answered."""
    ended, answered = threading.Event(), list[float]()

    def ask() -> None:
        while not ended.is_set():
            answered.append(server.first_token(prompts.of(_LONG)))

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        time.sleep(1.0)  # its first pass has begun
        try:
            yield answered
        finally:
            ended.set()
            asking.result()


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """The 50th and the 99th (of few requests: the longest)."""
    ordered = sorted(seconds)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def table(result: Result) -> Table:
    title = f"{result.model}, {result.cap / 1e6:.0f} MB: seconds to the first token of {_SHORT} tokens"
    shown = Table(title=title, title_justify="left")
    for column in ("server", "situation", "50 %", "99 %", "requests", "long prompts"):
        shown.add_column(column, justify="left" if column in ("server", "situation") else "right")
    for name in result.quiet:
        for situation, times, long in (
            ("quiet", result.quiet[name], ""),
            (f"beside prompts of {_LONG}", result.beside[name], str(result.long_prompts[name])),
        ):
            half, most = percentiles(times)
            shown.add_row(name, situation, f"{half:.2f}", f"{most:.2f}", str(len(times)), long)
    return shown
