"""The machine that is measured: readahead, page cache, load, and what its disk can do."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECORD = 864 << 10  # one expert's slice of one matrix of Qwen3-30B-A3B in Q4_0, and the unit of the raw read rates
LINUX_READAHEAD_KB = 128


def readahead_file(path: Path) -> Path:
    """The readahead setting of the device that holds `path`."""
    device = os.stat(path).st_dev
    return Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")


def readahead_kb(path: Path) -> int | None:
    try:
        return int(readahead_file(path).read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def readahead(path: Path, kb: int | None) -> Iterator[None]:
    """Sets the readahead of the device that holds `path`, and sets it back. None leaves it as it is.

    Raises PermissionError without the right to set it.
    """
    before = readahead_kb(path)
    if kb is None or kb == before or before is None:
        yield
        return
    file = readahead_file(path)
    try:
        file.write_text(str(kb))
        yield
    finally:
        file.write_text(str(before))


def drop_caches(*paths: Path) -> bool:
    """Empties the page cache; without the right to, only that of the given files. Returns whether all was dropped."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    except OSError:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        return False


def busy_cpus(seconds: float = 0.5) -> float:
    """CPUs kept busy right now, by anyone."""

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    total, idle = ticks()
    time.sleep(seconds)
    total_after, idle_after = ticks()
    elapsed = max(total_after - total, 1)
    return (1 - (idle_after - idle) / elapsed) * (os.cpu_count() or 1)


def wait_until_idle(limit: float, patience: float = 60.0) -> float:
    """Waits until at most `limit` CPUs are busy, `patience` seconds at most. Returns the CPUs busy at the end."""
    deadline = time.monotonic() + patience
    while (busy := busy_cpus()) > limit and time.monotonic() < deadline:
        time.sleep(1.0)
    return busy


def raw_read_rates(path: Path, seconds: float = 2.0) -> dict[str, float]:
    """Bytes per second of O_DIRECT reads: random records one and eight at a time, and one sequential stream."""
    return {
        "random_864k_depth_1": read_rate(path, RECORD, 1, seconds),
        "random_864k_depth_8": read_rate(path, RECORD, 8, seconds),
        "sequential_8m_depth_1": read_rate(path, 8 << 20, 1, seconds, sequential=True),
    }


def read_rate(path: Path, size: int, depth: int, seconds: float, *, sequential: bool = False) -> float:
    """Bytes per second of O_DIRECT reads of `size` bytes, `depth` at a time: a thread for each read in flight."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        n_chunks = os.fstat(fd).st_size // size
        if n_chunks == 0:
            raise ValueError(f"{path} is smaller than one read of {size} bytes")

        def worker(number: int) -> int:
            buffer = [mmap.mmap(-1, size)]  # page-aligned, as O_DIRECT wants it
            rng = random.Random(number)
            at, done = number, 0
            while time.perf_counter() < deadline:
                chunk = at % n_chunks if sequential else int(rng.random() * n_chunks)
                at += depth
                done += os.preadv(fd, buffer, chunk * size)
            return done

        started = time.perf_counter()
        deadline = started + seconds
        with ThreadPoolExecutor(depth) as pool:
            total = sum(pool.map(worker, range(depth)))
        return total / (time.perf_counter() - started)
    finally:
        os.close(fd)


def description(path: Path) -> dict[str, object]:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "readahead_kb": readahead_kb(path),
    }
