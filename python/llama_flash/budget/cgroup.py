"""Limits and usage of memory and CPU time as the kernel tells them: cgroup v1, v2, hybrid mounts, containers, machine.

Only reads. What follows from the numbers is the business of rooms.py and cores.py; capped.py makes groups.
Every function takes the root of the file system, so that recorded trees can be read as well as the live one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

__all__ = [
    "Controller",
    "CpuGroup",
    "Gauge",
    "Machine",
    "MemoryGroup",
    "PressureWatch",
    "ProcessMemory",
    "cpu_groups",
    "machine_memory",
    "memory_controller",
    "memory_groups",
    "parse_limit",
    "process_memory",
]

# v1 writes "no limit" as the largest multiple of the page size below 2^63 (2^63 - 4096, or - 65536 on large pages).
_UNLIMITED_V1 = 1 << 62


@dataclass(frozen=True)
class Controller:
    """Where a resource of this process is accounted."""

    version: Literal[1, 2]
    mount: Path  # of the hierarchy, below the given root
    group: Path  # this process' group; the mount itself where the group is outside of what the container sees

    def lineage(self) -> Iterator[Path]:
        """The group and its ancestors up to the mount, innermost first."""
        group = self.group
        while True:
            yield group
            if group == self.mount:
                return
            group = group.parent


@dataclass(frozen=True)
class MemoryGroup:
    """One memory cgroup. All sizes in bytes, descendants included."""

    path: Path
    limit: int | None  # None: unlimited
    usage: int
    droppable: int  # page cache that the kernel can give up: not shmem, which counts as cache but has no other home

    @property
    def held(self) -> int:
        """Usage that cannot be reclaimed without swapping."""
        return max(0, self.usage - self.droppable)


@dataclass(frozen=True)
class CpuGroup:
    """One CPU cgroup that has a quota, descendants included."""

    path: Path
    cores: float  # that may be busy, on average over a period
    throttled: int  # periods in which the quota was used up, and the group stopped
    throttled_seconds: float  # for which it was stopped, as the kernel adds it up


@dataclass(frozen=True)
class Machine:
    """Memory of the machine, in bytes."""

    total: int
    available: int


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, in bytes."""

    anonymous: int
    shmem: int
    file: int  # mapped files: libraries, and models loaded through mmap
    page_tables: int

    @property
    def held(self) -> int:
        """What the kernel cannot take back: all but mapped files."""
        return self.anonymous + self.shmem + self.page_tables


class Gauge:
    """A group's usage and limit, read through files that stay open: some microseconds."""

    _V1, _V2 = ("memory.usage_in_bytes", "memory.limit_in_bytes"), ("memory.current", "memory.max", "memory.high")

    def __init__(self, group: Path) -> None:
        self.group = group
        self.droppable = 0  # bytes of page cache in the usage, as known from elsewhere
        self.left = 0  # bytes, at the last glance
        self.looked = 0  # the same, when the caller last looked at more
        self._open: list[int] = []
        names = self._V1 if (group / self._V1[0]).exists() else self._V2
        with contextlib.suppress(OSError):
            for name in names:
                self._open.append(os.open(group / name, os.O_RDONLY | os.O_CLOEXEC))
        self._limit = self._read_limit()

    def alarmed(self, near: int) -> bool:
        """Whether less than `near` bytes are left, or the limit is another one than at the last call."""
        limit, self._limit = self._limit, self._read_limit()
        if self._limit is None:
            return limit is not None
        self.left = self._limit - self._usage() + self.droppable
        return limit != self._limit or self.left < near

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def _usage(self) -> int:
        try:
            return int(os.pread(self._open[0], 64, 0))
        except (OSError, ValueError, IndexError):  # the group is gone
            return 0

    def _read_limit(self) -> int | None:
        limits = []
        for file in self._open[1:]:
            with contextlib.suppress(OSError, ValueError):
                limits.append(parse_limit(os.pread(file, 64, 0).decode()))
        return _least(limits)


class PressureWatch:
    """Notices that the kernel finds it hard to free memory in a group of this process, or in one above it.

    v1: the notification "critical" of memory.pressure_level, where the group lets this process ask for it. v2: time
    stalled, from memory.pressure, and limits met, from memory.events.local. A group's stalls may be those of groups
    below it, and a limit is met also where dropping page cache was all that it took: in v2, only what the caller says
    is tight counts. Where neither can be had it notices nothing.
    """

    STALLED = 0.1  # share of the time since the last look

    def __init__(self, root: Path = Path("/"), pid: int | Literal["self"] = "self") -> None:
        controller = memory_controller(root, pid)
        self._events: list[int] = []  # v1: eventfds
        self._groups: list[Path] = []  # v2
        self._seen: dict[Path, tuple[float, int, int]] = {}
        if controller is None:
            return
        for group in controller.lineage():
            if controller.version == 1:
                with contextlib.suppress(OSError):
                    self._events.append(_notified(group))
            elif (group / "memory.pressure").exists():
                self._groups.append(group)
        self.poll(0.0, [])

    def poll(self, now: float, tight: Sequence[Path]) -> bool:
        """Whether there was pressure since the last call.

        Args:
            now: seconds, of any clock.
            tight: groups in which little is left that could be had without effort.
        """
        found = False
        for event in self._events:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(event)
                found = True
        for group in self._groups:
            stalled, limits = _stalled(group / "memory.pressure"), _limits_met(group / "memory.events.local")
            before = self._seen.get(group)
            self._seen[group] = (now, stalled, limits)
            if before is not None and group in tight:
                elapsed = max(now - before[0], 1e-3)
                found = found or stalled - before[1] > self.STALLED * elapsed * 1e6 or limits > before[2]
        return found

    @property
    def events(self) -> list[int]:
        """File descriptors that are readable when there is something to notice; without them, poll now and then."""
        return list(self._events)

    def close(self) -> None:
        while self._events:
            os.close(self._events.pop())


def _notified(group: Path) -> int:
    """An eventfd that counts a v1 group's notifications of critical pressure of its own, not of groups below it."""
    event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        level = os.open(group / "memory.pressure_level", os.O_RDONLY | os.O_CLOEXEC)
        try:
            (group / "cgroup.event_control").write_text(f"{event} {level} critical,local")
        finally:
            os.close(level)
    except OSError:
        os.close(event)
        raise
    return event


def _stalled(path: Path) -> int:
    """Microseconds for which some task of a group has waited for memory."""
    match = re.search(r"^some .*\btotal=(\d+)", _read(path), re.MULTILINE)
    return int(match[1]) if match else 0


def _limits_met(path: Path) -> int:
    events = _table(_read(path))
    return events.get("high", 0) + events.get("max", 0)


def parse_limit(text: str) -> int | None:
    """Bytes of a cgroup limit file; None for unlimited ("max", "-1", v1's number near 2^63).

    Raises:
        ValueError: if it is none of these.
    """
    text = text.strip()
    if text in ("max", "-1"):
        return None
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"not a cgroup limit: {text!r}")
    limit = int(text)
    return None if limit >= _UNLIMITED_V1 else limit


def memory_controller(root: Path = Path("/"), pid: int | Literal["self"] = "self") -> Controller | None:
    """The memory controller of process `pid`, None where there is none (or none is visible)."""
    return _controller("memory", "memory.current", root, pid)


def _controller(name: str, file: str, root: Path, pid: int | Literal["self"]) -> Controller | None:
    """Of `name`; file: that its groups have in v2.

    A v1 hierarchy wins over v2, because a controller can be in one of them only.
    """
    groups: dict[str, str] = {}  # controller ("" for v2) -> path of the group
    for line in _lines(root / "proc" / str(pid) / "cgroup"):
        fields = line.split(":", 2)
        if len(fields) == 3:
            for controller in fields[1].split(","):
                groups[controller] = fields[2]
    v1: Controller | None = None
    v2: Controller | None = None
    for line in _lines(root / "proc" / str(pid) / "mountinfo"):
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) < 5 or len(right) < 3:
            continue
        mount_root, mount = _unescape(left[3]), root / _unescape(left[4]).lstrip("/")
        if v1 is None and right[0] == "cgroup" and name in right[2].split(",") and name in groups:
            v1 = Controller(1, mount, _below(mount, mount_root, groups[name]))
        if v2 is None and right[0] == "cgroup2" and "" in groups:
            v2 = Controller(2, mount, _below(mount, mount_root, groups[""]))
    if v1 is not None:
        return v1
    if v2 is not None and name in _read(v2.mount / "cgroup.controllers").split():
        return v2
    if v2 is not None and any((path / file).exists() for path in v2.lineage()):
        return v2
    return None


def cpu_groups(root: Path = Path("/"), pid: int | Literal["self"] = "self") -> list[CpuGroup]:
    """The groups with a quota that `pid` counts in, innermost first. Each of them stops it: the tightest decides."""
    controller = _controller("cpu", "cpu.max", root, pid)
    if controller is None:
        return []
    result: list[CpuGroup] = []
    for path in controller.lineage():
        cores = _quota_v1(path) if controller.version == 1 else _quota_v2(path)
        if cores is not None:
            stat = _table(_read(path / "cpu.stat"))
            seconds = stat.get("throttled_time", 0) / 1e9 + stat.get("throttled_usec", 0) / 1e6  # v1, v2
            result.append(CpuGroup(path, cores, stat.get("nr_throttled", 0), seconds))
    return result


def _quota_v1(path: Path) -> float | None:
    quota, period = _number(path / "cpu.cfs_quota_us"), _number(path / "cpu.cfs_period_us")  # -1: no quota
    return quota / period if quota and period else None


def _quota_v2(path: Path) -> float | None:
    fields = _read(path / "cpu.max").split()  # "max 100000": no quota
    if len(fields) != 2 or not all(field.isascii() and field.isdigit() for field in fields):
        return None
    quota, period = map(int, fields)
    return quota / period if quota and period else None


def memory_groups(
    root: Path = Path("/"), pid: int | Literal["self"] = "self", controller: Controller | None = None
) -> list[MemoryGroup]:
    """The memory groups that `pid` counts in, innermost first; empty where there is no memory controller.

    Each of them limits the process: the tightest decides.

    Args:
        controller: of the process, where the caller knows it: finding it takes longer than all the rest.
    """
    controller = controller or memory_controller(root, pid)
    if controller is None:
        return []
    read = _read_v1 if controller.version == 1 else _read_v2
    result: list[MemoryGroup] = []
    for path in controller.lineage():
        # v1 without hierarchy: a group's pages are not charged to its ancestors
        if controller.version == 1 and result and _read(path / "memory.use_hierarchy").strip() == "0":
            break
        group = read(path)
        if group is not None:
            result.append(group)
    return result


def is_alone(group: Path, pid: int, companions: Collection[int] = ()) -> bool:
    """Whether nobody but process `pid`, and its companions, is in the memory group, and no groups are below it."""
    try:
        with os.scandir(group) as entries:
            if any(entry.is_dir() for entry in entries):
                return False
        found = set(map(int, _read(group / "cgroup.procs").split()))
        return pid in found and found <= {pid, *companions}
    except OSError:  # the group is gone
        return False


def machine_memory(root: Path = Path("/")) -> Machine:
    """Memory of the machine from /proc/meminfo.

    Raises:
        OSError: if /proc/meminfo cannot be read.
        ValueError: if it has no MemTotal.
    """
    info = _table((root / "proc" / "meminfo").read_text().replace(":", " "), unit=1024)
    if "MemTotal" not in info:
        raise ValueError("/proc/meminfo has no MemTotal")
    # before Linux 3.14 there is no MemAvailable
    available = info.get("MemAvailable", info.get("MemFree", 0) + info.get("Cached", 0) - info.get("Shmem", 0))
    return Machine(info["MemTotal"], max(0, available))


def process_memory(root: Path = Path("/"), pid: int | Literal["self"] = "self") -> ProcessMemory:
    """Memory of process `pid` from /proc/PID/status."""
    info = _table((root / "proc" / str(pid) / "status").read_text().replace(":", " "), unit=1024)
    return ProcessMemory(
        anonymous=info.get("RssAnon", info.get("VmRSS", 0)),
        shmem=info.get("RssShmem", 0),
        file=info.get("RssFile", 0),
        page_tables=info.get("VmPTE", 0),
    )


def _read_v1(path: Path) -> MemoryGroup | None:
    usage = _number(path / "memory.usage_in_bytes")
    if usage is None:
        return None
    stat = _table(_read(path / "memory.stat"))
    limits = [_limit(path / "memory.limit_in_bytes")]
    # also knows the ancestors that a container does not show
    hierarchical = stat.get("hierarchical_memory_limit")
    if hierarchical is not None and hierarchical < _UNLIMITED_V1:
        limits.append(hierarchical)
    droppable = sum(stat.get(f"total_{key}", stat.get(key, 0)) for key in ("inactive_file", "active_file"))
    return MemoryGroup(path, _least(limits), usage, min(droppable, usage))


def _read_v2(path: Path) -> MemoryGroup | None:
    usage = _number(path / "memory.current")
    if usage is None:
        return None  # the root group, or a group without the controller
    stat = _table(_read(path / "memory.stat"))
    # above memory.high the kernel throttles the process almost to a halt, so it is a limit for us
    limit = _least([_limit(path / "memory.max"), _limit(path / "memory.high")])
    droppable = sum(stat.get(key, 0) for key in ("inactive_file", "active_file"))
    return MemoryGroup(path, limit, usage, min(droppable, usage))


def _below(mount: Path, mount_root: str, group: str) -> Path:
    """`group` (as /proc/PID/cgroup names it) below `mount`, which shows the hierarchy from `mount_root` on."""
    inside = PurePosixPath(group)
    if mount_root != "/" and inside.is_relative_to(mount_root):
        inside = "/" / inside.relative_to(mount_root)
    if ".." in inside.parts:
        return mount
    path = mount / str(inside).lstrip("/")
    return path if path.is_dir() else mount


def _least(limits: list[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(path: Path) -> int | None:
    try:
        return parse_limit(path.read_text())
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


_ROW = re.compile(r"^(\S+)[ \t]+(\d+)(?!\S)", re.MULTILINE | re.ASCII)


def _table(text: str, unit: int = 1) -> dict[str, int]:
    """Lines "key number ..." as bytes."""
    return {key: int(number) * unit for key, number in _ROW.findall(text)}


def _lines(path: Path) -> list[str]:
    return _read(path).splitlines()


def _read(path: Path) -> str:
    """Read four times a second for each group, so without a text layer."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode()
    except (OSError, UnicodeDecodeError):
        return ""


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
