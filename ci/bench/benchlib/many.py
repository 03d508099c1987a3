"""Several clients at once: tokens per second in all, of `llama-flash serve` with flash offload and of the resident run.

Each server has the model loaded, those with flash offload under a cap of half of the file, and they take turns: as many
clients as a server has sequences ask for the same number of tokens each, from prompts of one token, with sampling (a
model of random weights would repeat itself). The resident server answers any number of clients.

Beside each speed stands what bounds it: the device, were reading what was read all that there is to do, and computing,
which is what the resident server does.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from benchlib import machine
from benchlib.models import DENSE_GQA, MOE_SKEWED, RELU_Q8, BenchModel
from benchlib.turns import BuildError

MODELS: tuple[tuple[str, BenchModel, tuple[int, ...]], ...] = (  # kind, model, numbers of clients
    ("dense", DENSE_GQA, (1, 8, 32)),
    ("moe", MOE_SKEWED, (1, 8, 32)),
    ("relu", RELU_Q8, (1, 8)),  # the KV cache of more takes all
)
_CAP = 0.5  # of the file
_N_CTX = 256  # of each sequence: the least that the engine makes
_TURN = 3.0  # seconds, about
_LEAST_TOKENS = 8  # of an answer: the first pass of a turn has the first client only
_WARM_TURNS = 2
_PATIENCE = 600.0  # seconds
# what is to be reached, by the kind of model and the number of clients: over one sequence with flash offload, over one
# resident, over as many resident
_TARGETS: dict[str, dict[int, tuple[float | None, float | None, float | None]]] = {
    "dense": {8: (7.0, 1.5, None), 32: (20.0, 4.0, 0.9)},
    "moe": {8: (2.0, 1.2, None), 32: (3.5, 1.8, 0.8)},
    "relu": {8: (2.0, None, None)},
}


@dataclass(frozen=True)
class Reads:
    """Of all turns of so many clients with flash offload."""

    tokens: int = 0
    passes: int = 0  # of the engine
    bytes_read: int = 0
    wait_seconds: float = 0.0

    def __add__(self, other: Reads) -> Reads:
        return Reads(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def device(self, rate: float) -> float:
        """Tokens per second, were reading at so many bytes per second all that there is to do."""
        return rate * self.tokens / self.bytes_read if self.bytes_read else float("inf")


@dataclass(frozen=True)
class Result:
    """Of one model: tokens per second in all, of each turn, by the number of clients."""

    model: str
    kind: str
    flash: dict[int, list[float]]
    resident: dict[int, list[float]]
    reads: dict[int, Reads]  # with flash offload
    rate: float  # bytes per second that the device gives

    def limit(self, n: int) -> float:
        """Tokens per second of `n` clients at most: what the device gives, and what can be computed."""
        return min(self.reads[n].device(self.rate), statistics.median(self.resident[n]))

    def over(self, n: int, other: dict[int, list[float]], m: int) -> float:
        """Speed of `n` clients with flash offload over that of `m` of `other`: medians of all turns."""
        return statistics.median(self.flash[n]) / statistics.median(other[m])

    def verdicts(self) -> list[tuple[str, float, float]]:
        """What, the ratio, and what was to be reached."""
        found = []
        for n, (flash, one, same) in _TARGETS[self.kind].items():
            for what, other, m, least in (
                ("one with flash offload", self.flash, 1, flash),
                ("one resident", self.resident, 1, one),
                (f"{n} resident", self.resident, n, same),
            ):
                if least is not None and n in self.flash and m in other:
                    found.append((f"{n} over {what}", self.over(n, other, m), least))
        return found

    def to_json(self) -> dict[str, Any]:
        verdicts = [{"what": what, "ratio": ratio, "least": least} for what, ratio, least in self.verdicts()]
        return asdict(self) | {"verdicts": verdicts, "limit": {n: self.limit(n) for n in self.flash}}


class Served:
    """A server of its own process, which has come to serving.

    Args:
        flash: options of FlashOffload; None: the defaults where there is a cap, else none of it.
        n_ctx: tokens of a sequence.
        n_ubatch: tokens computed at once, at most; None: the server's default.

    Raises:
        BuildError: it did not.
    """

    def __init__(
        self,
        model: Path,
        parallel: int,
        cap: int | None,
        folder: str,
        flash: dict[str, Any] | None = None,
        n_ctx: int = _N_CTX,
        n_ubatch: int | None = None,
    ) -> None:
        settings = Path(folder) / f"{parallel}-{cap}-{len(list(Path(folder).iterdir()))}.json"
        loaded: dict[str, Any] = {"model": str(model), "n_ctx": n_ctx, "flash_offload": flash or cap is not None}
        loaded |= {} if n_ubatch is None else {"n_ubatch": n_ubatch}
        settings.write_text(json.dumps({"models": [loaded]}))
        command = [sys.executable, "-m", "llama_flash", "serve", "--config-file", str(settings), "--port", "0"]
        command += ["--parallel", str(parallel)]
        if cap is not None:
            command = [sys.executable, "-m", "llama_flash", "cap", str(cap), "--", *command]
        self._log = settings.with_suffix(".log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + _PATIENCE
        while not (found := re.search(r"serving http://([^/\s]+):(\d+)/", self._log.read_text())):
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                raise BuildError(f"{model.name}, {parallel} sequences: {self._log.read_text().strip()[-500:]}")
            time.sleep(0.1)
        self.address = found[1], int(found[2])

    def turn(self, n_clients: int, n_tokens: int) -> tuple[float, Reads]:
        """Tokens per second of all clients together, each of which asks for so many, and what was read for them."""
        before = self._counted()
        began = time.monotonic()
        with ThreadPoolExecutor(n_clients) as pool:
            told = sum(pool.map(lambda seed: self._ask(seed, n_tokens), range(n_clients)))
        seconds = time.monotonic() - began
        calls, n_bytes, waited = (now - then for now, then in zip(self._counted(), before, strict=True))
        return told / seconds, Reads(told, int(calls), int(n_bytes), waited)

    def _counted(self) -> tuple[float, float, float]:
        """Calls of the engine, bytes that were read and seconds that were waited for them, from the load on."""
        with contextlib.closing(http.client.HTTPConnection(*self.address, timeout=_PATIENCE)) as connection:
            connection.request("GET", "/health")
            flash = json.loads(connection.getresponse().read()).get("flash")
        total = flash["total"] if flash else {"calls": 0, "bytes_read": 0, "wait_seconds": 0.0}
        return total["calls"], total["bytes_read"], total["wait_seconds"]

    def _ask(self, seed: int, n_tokens: int) -> int:
        """Tokens of the answer."""
        body = {
            "prompt": [10 + seed],
            "n_predict": n_tokens,
            "seed": seed,
            "temperature": 2.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        return int(self.ask(body)["tokens_predicted"])

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request for a completion."""
        connection = http.client.HTTPConnection(*self.address, timeout=_PATIENCE)
        with contextlib.closing(connection):
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        if answer.status != 200:
            raise BuildError(f"the server answers {answer.status}: {text.decode(errors='replace')[:300]}")
        found: dict[str, Any] = json.loads(text)
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def measure(
    folder: Path,
    seconds: float,
    report: Callable[[str], None],
    *,
    keep: bool = False,
    layers: int | None = None,
    most: int = 32,
) -> Iterator[Result]:
    """A dense model, a mixture and a model in neuron bundles; so many seconds of turns with each.

    Args:
        layers: of each model; None: all.
        most: clients at once.

    Raises:
        OSError: the disk has no room for a model.
        BuildError: a server did not start, or refused.
    """
    for kind, model, widths in MODELS:
        yield _measure(kind, model, folder, seconds, report, keep, layers, [n for n in widths if n <= most])


def _measure(
    kind: str,
    model: BenchModel,
    folder: Path,
    seconds: float,
    report: Callable[[str], None],
    keep: bool,
    layers: int | None,
    widths: Sequence[int],
) -> Result:
    files = model.ensure(folder, layers)
    cap = int(files.stock.stat().st_size * _CAP)
    try:
        machine.drop_caches(files.flash)
        rate = max(machine.raw_read_rates(files.flash, 1.0).values())
        with tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as logs, contextlib.ExitStack() as running:

            def served(path: Path, parallel: int, cap: int | None) -> Served:
                report(f"{model.name}: loading, {parallel} sequences, {'resident' if cap is None else 'flash'}")
                return running.enter_context(contextlib.closing(Served(path, parallel, cap, logs)))

            ways = {("flash", n): served(files.flash, n, cap) for n in widths}
            resident = served(files.stock, max(widths), None)
            ways |= {("resident", n): resident for n in widths}
            found, reads = _turns(ways, seconds, lambda text: report(f"{model.name}: {text}"))
    finally:
        if not keep:
            files.remove()
    by_mode = {mode: {n: found[mode, n] for n in widths} for mode in ("flash", "resident")}
    counted = {n: reads["flash", n] for n in widths}
    return Result(model.name, kind, by_mode["flash"], by_mode["resident"], counted, rate)


def _turns(
    ways: dict[tuple[str, int], Served], seconds: float, report: Callable[[str], None]
) -> tuple[dict[tuple[str, int], list[float]], dict[tuple[str, int], Reads]]:
    """Tokens per second of each turn, and what was read in all of them."""
    tokens = {}
    for (mode, n), server in ways.items():
        report(f"warming up, {n} clients, {mode}")
        speeds = [server.turn(n, 4)[0] for _ in range(_WARM_TURNS)]
        tokens[mode, n] = min(_N_CTX - 8, max(_LEAST_TOKENS, round(_TURN * speeds[-1] / n)))
    found: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    reads = {way: Reads() for way in ways}
    order = list(ways)
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(found[order[0]]) < 2:
        report(f"{max(0.0, end - time.monotonic()):.0f} s left")
        random.shuffle(order)
        for way in order:
            speed, read = ways[way].turn(way[1], tokens[way])
            found[way].append(speed)
            reads[way] += read
    return found, reads


def table(result: Result) -> Table:
    """tok/s in all, the spread of the turns, and what was to be reached."""
    shown = Table(title=f"{result.model} at half of its size: tok/s of all clients", title_justify="left")
    for column in ("clients", "flash", "resident", "tokens, MB a pass", "device alone", "of the limit", "turns"):
        shown.add_column(column, justify="right")
    for n, speeds in result.flash.items():
        reads = result.reads[n]
        passes = max(1, reads.passes)
        counted = f"{reads.tokens / passes:.1f}, {reads.bytes_read / passes / 1e6:.0f}"
        bounds = f"{reads.device(result.rate):.2f}", f"{statistics.median(speeds) / result.limit(n):.2f}"
        shown.add_row(str(n), _spread(speeds), _spread(result.resident[n]), counted, *bounds, str(len(speeds)))
    shown.caption = "; ".join(
        f"{what}: {ratio:.2f} (at least {least:g}: {'yes' if ratio >= least else 'no'})"
        for what, ratio, least in result.verdicts()
    )
    shown.caption += f"\nthe device: {result.rate / 1e9:.2f} GB/s; the limit: the device alone, or the resident server"
    shown.caption_justify = "left"
    return shown


def _spread(speeds: list[float]) -> str:
    return f"{statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})"
