"""How many threads compute where nobody says, and whether a CPU quota stops them.

Two threads on one physical core share its units, and threads beyond a quota use it up sooner and are all stopped until
the next period. So: physical cores among the CPUs that affinity allows, and no more threads than the tightest quota
above this process lets run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .cgroup import CpuGroup, cpu_groups

__all__ = [
    "Threads",
    "Throttling",
    "choose_threads",
    "default_threads",
    "describe_threads",
    "explain_throttling",
    "physical_cores",
]


@dataclass(frozen=True)
class Threads:
    """A number of threads, and why it is this one."""

    n: int
    reason: str
    awake: float = 1.0  # share of the time in which the tightest quota lets all of them run

    def __str__(self) -> str:
        return f"{_count(self.n, 'thread')}: {self.reason}"


def choose_threads(
    root: Path = Path("/"), pid: int | Literal["self"] = "self", allowed: Collection[int] | None = None
) -> Threads:
    """The number of threads that this process should compute with.

    Args:
        root: of the file system, so that recorded trees can be read as well as the live one.
        allowed: numbers of the CPUs that it may run on; None: as affinity says now.
    """
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    cores = physical_cores(allowed, root)
    reason = _count(cores, "physical core")
    n_cpus = len(_list(_text(root / "sys/devices/system/cpu/online")))
    if len(allowed) < n_cpus:
        reason += f" among the {len(allowed)} of {n_cpus} CPUs that affinity allows"
    tightest = min(cpu_groups(root, pid), key=lambda group: group.cores, default=None)
    if tightest is None or math.ceil(tightest.cores) > cores:
        return Threads(cores, reason)
    quota = f"the quota of {tightest.path} is {tightest.cores:.3g} of {reason}"
    n = max(1, math.ceil(tightest.cores))
    return Threads(n, quota, min(1.0, tightest.cores / n))


def default_threads() -> int:
    """choose_threads, for those who want the number only."""
    return choose_threads().n


def describe_threads(n: int) -> str:
    """`n` threads that a model computes with: why so many, or what the default would be."""
    chosen = choose_threads()
    return str(chosen) if n == chosen.n else f"{_count(n, 'thread')} as asked for (default: {chosen})"


def physical_cores(allowed: Collection[int], root: Path = Path("/")) -> int:
    """Cores to which the CPUs of these numbers belong; where the kernel does not tell, as many as there are CPUs."""
    cores = set()
    for cpu in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        # the newer name first
        siblings = _text(topology / "core_cpus_list") or _text(topology / "thread_siblings_list")
        cores.add(siblings.strip() or str(cpu))
    return max(1, len(cores))


class Throttling:
    """What quotas have done to this process since this object was made."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._before = {group.path: group for group in cpu_groups(root)}

    def since(self) -> tuple[int, float]:
        """Periods in which it was stopped, and seconds for which; of the group that was stopped most."""
        return max(map(self._of, cpu_groups(self._root)), default=(0, 0.0))

    def _of(self, group: CpuGroup) -> tuple[int, float]:
        before = self._before.get(group.path)
        if before is None:  # it has got its quota, or the process has come to it, since
            self._before[group.path] = group
            return 0, 0.0
        return max(0, group.throttled - before.throttled), max(0.0, group.throttled_seconds - before.throttled_seconds)


def explain_throttling(times: int, seconds: float) -> str:
    """What Throttling has found, and what to do about it."""
    return (
        f"a CPU quota stopped the process in {_count(times, 'period')}, for {seconds:.1f} s of all cores together: "
        "use no more threads than the quota has cores, rounded up, as by default (n_threads, --threads), or raise it "
        "(cpu.max, cpu.cfs_quota_us)"
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _list(text: str) -> set[int]:
    """CPUs as the kernel lists them: "0-3,8"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (not last or last.isdigit()):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
