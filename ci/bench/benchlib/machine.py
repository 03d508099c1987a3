"""The machine that is measured: readahead, page cache, load, and what its disk can do."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llama_flash.budget.capped import run_capped
from llama_flash.budget.cgroup import machine_memory
from llama_flash.native.calls import probe_reads

RECORD = 864 << 10  # one expert's slice of one matrix of Qwen3-30B-A3B in Q4_0, and the unit of the raw read rates
LINUX_READAHEAD_KB = 128
_SPARE = 1 << 30  # bytes
_REST = 20.0  # seconds
_FIRST_TOUCH = Path(__file__).with_name("first_touch.py")


def readahead_file(path: Path) -> Path:
    """The readahead setting of the device that holds `path`."""
    device = os.stat(path).st_dev
    return Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")


def readahead_kb(path: Path) -> int | None:
    try:
        return int(readahead_file(path).read_text())
    except (OSError, ValueError):
        return None


def can_set_readahead(path: Path) -> bool:
    """False without the right to, and where /sys is read-only, as in most containers."""
    return os.access(readahead_file(path), os.W_OK)


@contextlib.contextmanager
def readahead(path: Path, kb: int | None) -> Iterator[None]:
    """Sets the readahead of the device that holds `path`, and sets it back. None leaves it as it is.

    Raises PermissionError without the right to set it.
    """
    if kb is None or readahead_kb(path) is None:
        yield
        return
    file = readahead_file(path)
    with file.open() as setting:
        fcntl.flock(setting, fcntl.LOCK_EX)  # another run would take ours for the machine's, and set that back
        before = readahead_kb(path)
        if kb == before:
            yield
            return
        try:
            file.write_text(str(kb))
            yield
        finally:
            file.write_text(str(before))


_BLKIO = Path("/sys/fs/cgroup/blkio")


@contextlib.contextmanager
def throttled(path: Path, bytes_per_second: float | None) -> Iterator[None]:
    """Lets this process, and those that it starts, read so much a second at most from the device that holds `path`.

    A group of cgroup v1's blkio controller, removed afterwards. None: as fast as the device is.

    Raises OSError where there is no such controller, or no right to use it, or `path` lies on no block device.
    """
    if bytes_per_second is None:
        yield
        return
    number = os.stat(path).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not (_BLKIO / "blkio.throttle.read_bps_device").exists() or not device.exists():
        raise OSError(f"reads of {path} cannot be slowed down: no blkio controller of cgroup v1, or no block device")
    disk = device.resolve()
    disk = disk.parent if (disk / "partition").exists() else disk  # the whole disk is what can be throttled
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    before = next((line.rsplit(":", 1)[1] for line in lines if line.split(":")[1] == "blkio"), "/")
    group = _BLKIO / f"llama-flash-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "blkio.throttle.read_bps_device").write_text(
            f"{(disk / 'dev').read_text().strip()} {bytes_per_second:.0f}"
        )
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (_BLKIO / before.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


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


def fits(n_bytes: int) -> bool:
    """Whether the machine has memory for a process that holds so many bytes, and some to spare."""
    return n_bytes + _SPARE <= machine_memory().available


def rest(*paths: Path) -> None:
    """Empties the page cache and waits until a host has taken back what is free: memory as a run finds it that begins.

    A virtual machine that reports its free pages gives them up within seconds, and each costs a fault in the host
    when it is touched again: here twenty times what a page costs that was free for a moment only.
    """
    drop_caches(*paths)
    time.sleep(_REST)


def first_touch(n_bytes: int) -> float:
    """Seconds that it takes to touch so many bytes of fresh anonymous memory, in a memory cgroup of their own.

    `rest()` before it, if the memory was in use a moment ago.

    Raises FlashCapError where memory cannot be limited, OSError where it is not there.
    """
    command = [sys.executable, str(_FIRST_TOUCH), str(n_bytes)]
    done = run_capped(n_bytes + _SPARE, command, capture_output=True)
    if done.returncode:
        raise OSError(f"first touch of {n_bytes / 1e9:.1f} GB: {done.stderr or done.returncode}")
    return float(done.stdout or "")


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
    """Bytes per second of random reads past the page cache, of some sizes and numbers in flight."""
    rates = {}
    for name, size, depth in (("864 KiB, 1", RECORD, 1), ("864 KiB, 8", RECORD, 8), ("1 MiB, 32", 1 << 20, 32)):
        probe = probe_reads(path, size, depth, seconds)
        rates[f"reads of {name} in flight"] = probe.bytes / (probe.ns / 1e9)
    return rates


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
