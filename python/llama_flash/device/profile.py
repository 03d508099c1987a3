"""What a device gives to reads past the page cache, and what DRAM gives: measured once, used to plan.

The numbers behind plans (cost.py): bytes per second and latency by size of read and number in flight, with the reader
that decoding uses. How they are kept is in profile_cache.py.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..budget.cores import default_threads
from ..budget.rooms import held_by_process, resolve_budget
from ..errors import FlashError
from ..native import bindings
from ..native.calls import probe_reads
from ..native.library import IO_ENGINES
from ..options import IoEngine
from ..sizes import format_size
from .identity import Device, device_of

__all__ = [
    "CHUNKS",
    "DEPTHS",
    "DeviceProfile",
    "ReadRate",
    "default_profile",
    "measure",
    "measure_dram",
    "quick_profile",
]

CHUNKS = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 4, 32, 128)

VERSION = 2  # of what is stored

_SECONDS = 14.0  # of a whole profile, most
_WRITE_SECONDS = 4.0  # of these, for the temporary file
_CELL_SECONDS = 0.35
_LARGE_FILE = 256 << 20  # bytes from which on a file is read itself
_TEMPORARY = 1 << 30  # bytes of a temporary file, most
_LEAST_TEMPORARY = 32 << 20
_FREE_SHARE = 4  # the temporary file takes at most this fraction of what is free
_PIECE = 8 << 20  # bytes written at once
_DRAIN_SECONDS = 0.5  # a depth is left out where what is in flight would take longer than that to arrive

_USEFUL_DEPTHS = (8, 16, 32, 64, 128)
_DUEL = (
    (16 << 10, 32),
    (256 << 10, 8),
    (16 << 10, 32),
    (256 << 10, 8),
)  # sizes and depths, for engines
_CLEARLY = 1.1  # times the rate

_QUICK = ((4 << 10, 1), (4 << 10, 32), (64 << 10, 32), (1 << 20, 1), (1 << 20, 16))
_QUICK_SECONDS = 0.05
_DRAM_BYTES = 256 << 20  # beyond any cache, where there is room
_LEAST_DRAM_BYTES = 64 << 20
_LIBRARY_BYTES = 32 << 20  # of destinations, see llama_flash_probe_reads

# Without a measurement: a SATA SSD behind one memory channel. Better to promise too little.
_DEFAULT_LATENCY = 150e-6  # seconds
_DEFAULT_RATE = 450e6  # bytes per second
_DEFAULT_READS = 40e3  # per second
_DEFAULT_DRAM = 8e9  # bytes per second

Report = Callable[[float, str], None]  # share done, what is being done


@dataclass(frozen=True)
class ReadRate:
    """Random reads of one size, so many of them in flight."""

    chunk: int  # bytes of a read
    depth: int  # reads in flight
    bytes_per_second: float
    latency: float  # seconds from submission to arrival, mean
    latency_p99: float
    reads: int = 0  # that were made


@dataclass(frozen=True)
class DeviceProfile:
    """What a device and DRAM give."""

    device: Device
    measured: str  # time, ISO 8601; "" where nothing was measured
    source: Literal["measured", "cached", "quick probe", "defaults"]
    io_engine: str  # "io_uring", "pread"; "" where nothing was measured
    direct: bool  # reads went past the page cache
    file_bytes: int  # of the file that was read
    dram: float  # bytes per second, read by all cores
    reads: tuple[ReadRate, ...]
    faster: str = ""  # I/O engine that reads clearly faster than the one measured; "": none
    version: int = field(default=VERSION)

    def rate(self, chunk: float, depth: float) -> float:
        """Bytes per second of reads of `chunk` bytes with `depth` in flight, interpolated between the measured ones.

        Beyond the largest measured size or depth: that one's rate. Below the smallest: as many reads per second.
        """
        rows: dict[int, list[tuple[int, float]]] = {}
        for read in self.reads:
            rows.setdefault(read.chunk, []).append((read.depth, read.bytes_per_second))
        curve = [(size, _between(sorted(row), depth)) for size, row in sorted(rows.items())]
        smallest, slowest = curve[0]
        return slowest * chunk / smallest if chunk < smallest else _between(curve, chunk)

    def depth_for(self, chunk: float) -> int:
        """Reads in flight from which on the device gives what it has: more would only make each of them wait longer."""
        rates = {depth: self.rate(chunk, depth) for depth in _USEFUL_DEPTHS}
        return min(depth for depth, rate in rates.items() if rate >= 0.97 * max(rates.values()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: Literal["cached"] = "cached") -> DeviceProfile:
        """What `as_dict` gave.

        Raises:
            ValueError, TypeError, KeyError: that is something else.
        """
        if values["version"] != VERSION:
            raise ValueError(f"it is of version {values['version']}; `llama-flash profile` makes a new one")
        reads = tuple(ReadRate(**read) for read in values["reads"])
        profile = cls(**{**values, "device": Device(**values["device"]), "reads": reads, "source": source})
        numbers = [profile.dram, *(number for r in reads for number in (r.bytes_per_second, r.chunk, r.depth))]
        if not reads or not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError("rates that are not positive numbers")
        datetime.fromisoformat(profile.measured)
        return profile


def _between(curve: Sequence[tuple[float, float]], at: float) -> float:
    """Interpolated on logarithmic scales; the ends' values beyond them."""
    i = bisect.bisect_left(curve, (at, 0.0))
    if i == 0:
        return curve[0][1]
    if i == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    share = math.log(at / x0) / math.log(x1 / x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def measure(
    path: str | os.PathLike[str],
    *,
    io_engine: IoEngine = "auto",
    report: Report | None = None,
) -> DeviceProfile:
    """Measures the device that holds `path`, and DRAM; takes 15 seconds at most.

    Args:
        path: a file or directory on the device. A file of at least 256 MiB is read itself, else a temporary one beside
            it is (at most 1 GiB and a quarter of what is free; it has no name, so that nothing can be left behind).
        report: told how far it is.

    Raises:
        FileNotFoundError, PermissionError: of `path`.
        OSError: no temporary file can be made (ENOSPC: too little space).
        FlashReadError: a read failed.
        FlashError: the plugin is missing.
    """
    report = report or (lambda _share, _what: None)
    started = time.monotonic()
    report(0.0, "memory")
    device = device_of(path)
    with _file_to_read(Path(path), lambda share: report(0.3 * share, "writing a temporary file")) as (name, file_bytes):
        dram = measure_dram()
        # the deepest last: what came before tells how long it takes until all has arrived
        cells = sorted(((c, d) for c in CHUNKS for d in DEPTHS if c <= file_bytes), key=lambda cell: cell[0] * cell[1])
        reads: list[ReadRate] = []
        probe = bindings.llama_flash_probe()
        for i, (chunk, depth) in enumerate(cells):
            left = _SECONDS - (time.monotonic() - started)
            fastest = max((read.bytes_per_second for read in reads), default=math.inf)
            if reads and (left <= 0 or chunk * depth / fastest > _DRAIN_SECONDS):
                continue
            report(0.3 + 0.7 * i / len(cells), f"reads of {format_size(chunk)}, {depth} in flight")
            probe = probe_reads(name, chunk, depth, min(_CELL_SECONDS, left / (len(cells) - i)), io_engine)
            reads.append(_read_rate(chunk, depth, probe))
        faster = _faster_io_engine(name, file_bytes, probe.io_engine) if reads and io_engine == "auto" else ""
    if not reads:
        raise FlashError(f"{path}: the file is smaller than one read of {format_size(CHUNKS[0])}")
    report(1.0, "done")
    return replace(_profile(device, "measured", probe, file_bytes, dram, reads), faster=faster)


def _faster_io_engine(path: str, file_bytes: int, measured: int) -> str:
    """The other I/O engine, if it is clearly faster at small and large reads together; "" otherwise."""
    mine, other = ("io_uring", "pread") if measured == IO_ENGINES["io_uring"] else ("pread", "io_uring")
    ratio, n = 1.0, 0
    for chunk, depth in _DUEL:
        if chunk > file_bytes:
            continue
        try:
            pair = [probe_reads(path, chunk, depth, _QUICK_SECONDS, io_engine) for io_engine in (other, mine)]
        except FlashError:  # not to be had here
            return ""
        ratio, n = ratio * (pair[0].bytes / pair[0].ns) / (pair[1].bytes / pair[1].ns), n + 1
    return other if n and ratio ** (1 / n) > _CLEARLY else ""


def quick_profile(path: str | os.PathLike[str], io_engine: IoEngine = "auto") -> DeviceProfile:
    """A few sizes and depths, read from the file `path` itself in half a second; defaults where that fails."""
    reads: list[ReadRate] = []
    probe = bindings.llama_flash_probe()
    size, room = os.stat(path).st_size, _room()
    with contextlib.suppress(FlashError, OSError):
        for chunk, depth in _QUICK:
            if chunk <= size and min(chunk * depth, _LIBRARY_BYTES) <= room:
                probe = probe_reads(path, chunk, depth, _QUICK_SECONDS, io_engine)
                reads.append(_read_rate(chunk, depth, probe))
    if not reads:
        return default_profile(path)
    return _profile(device_of(path), "quick probe", probe, size, measure_dram(), reads)


def default_profile(path: str | os.PathLike[str]) -> DeviceProfile:
    """A device and a machine that are slower than most, for where nothing can be measured."""

    def read(chunk: int, depth: int) -> ReadRate:
        latency = _DEFAULT_LATENCY + chunk / _DEFAULT_RATE
        rate = min(depth * chunk / latency, _DEFAULT_RATE, _DEFAULT_READS * chunk)
        return ReadRate(chunk, depth, rate, depth * chunk / rate, depth * chunk / rate)

    reads = tuple(read(chunk, depth) for chunk in CHUNKS for depth in DEPTHS)
    return DeviceProfile(device_of(path), "", "defaults", "", True, 0, _DEFAULT_DRAM, reads)


def measure_dram(n_bytes: int = _DRAM_BYTES) -> float:
    """Bytes per second that all cores together read from memory; the default where there is no room to measure."""
    n_bytes = min(n_bytes, _room())
    if n_bytes < _LEAST_DRAM_BYTES:
        return _DEFAULT_DRAM
    n_threads = default_threads()
    parts = [np.ones(n_bytes // n_threads // 8, np.uint64) for _ in range(n_threads)]
    best = math.inf
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return sum(part.nbytes for part in parts) / best


def _room() -> int:
    """Bytes that measuring may take: half of what the tightest limit leaves."""
    return max(0, resolve_budget().total - held_by_process()) // 2


def _read_rate(chunk: int, depth: int, probe: bindings.llama_flash_probe) -> ReadRate:
    return ReadRate(
        chunk, depth, probe.bytes / (probe.ns / 1e9), probe.latency_ns / 1e9, probe.latency_p99_ns / 1e9, probe.reads
    )


def _profile(
    device: Device,
    source: Literal["measured", "quick probe"],
    probe: bindings.llama_flash_probe,
    file_bytes: int,
    dram: float,
    reads: list[ReadRate],
) -> DeviceProfile:
    io_engine = next(name for name, number in IO_ENGINES.items() if number == probe.io_engine)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return DeviceProfile(device, now, source, io_engine, bool(probe.direct), file_bytes, dram, tuple(reads))


@contextlib.contextmanager
def _file_to_read(path: Path, report: Callable[[float], None]) -> Iterator[tuple[str, int]]:
    """Name and bytes of a file on the device of `path`."""
    status = path.stat()
    if stat.S_ISREG(status.st_mode) and status.st_size >= _LARGE_FILE:
        with path.open("rb"):  # PermissionError
            pass
        yield str(path), status.st_size
        return
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is neither a file nor a directory")
    folder = path if stat.S_ISDIR(status.st_mode) else path.absolute().parent
    # here, as it takes some MB; and before there is a file, since a Ctrl-C in the middle of this import is lost
    from numpy.random import default_rng

    # without a name: gone with the process, whatever ends it
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        _fill(file.fileno(), folder, default_rng(), report)
        yield f"/proc/self/fd/{file.fileno()}", os.fstat(file.fileno()).st_size


def _fill(fd: int, folder: Path, rng: np.random.Generator, report: Callable[[float], None]) -> None:
    """Writes what no device can compress, as much as there is time and space for."""
    size = min(_TEMPORARY, shutil.disk_usage(folder).free // _FREE_SHARE)
    deadline = time.monotonic() + _WRITE_SECONDS
    done, failure = 0, None
    try:
        while done + _PIECE <= size and (done < _LEAST_TEMPORARY or time.monotonic() < deadline):
            data = rng.bytes(_PIECE)
            if os.write(fd, data) != _PIECE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(fd)
            os.posix_fadvise(fd, done, _PIECE, os.POSIX_FADV_DONTNEED)
            done += _PIECE
            report(done / size)
    except OSError as error:  # full, or a quota
        failure = error
    if done < _LEAST_TEMPORARY:
        code = (failure and failure.errno) or errno.ENOSPC
        raise OSError(
            code,
            f"{os.strerror(code)}: a temporary file needs {format_size(_LEAST_TEMPORARY)} and takes at most a quarter "
            f"of what is free; a file of at least {format_size(_LARGE_FILE)} would be read itself",
            str(folder),
        )
    os.ftruncate(fd, done)
