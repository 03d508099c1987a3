"""How much DRAM this process may take, and how that is divided.

The *budget* is for the whole process: interpreter and libraries, resident weights, KV cache, graph buffers, logits, the
reserve, and what is left for weights from flash. With "auto" it is

    min over every memory cgroup of the process   limit - what others in the group hold
        and the machine                           available memory + what we hold ourselves

where "hold" leaves out page cache that the kernel can drop. Our own memory is never counted as free, and what is free
is never counted as ours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import FlashBudgetError
from ..sizes import format_size, parse_size
from .cgroup import Controller, machine_memory, memory_groups, process_memory

__all__ = [
    "LIBRARIES_MAX",
    "MACHINE",
    "Breakdown",
    "Budget",
    "Room",
    "default_reserve",
    "held_by_process",
    "kept_budget",
    "reserve_of",
    "resolve_budget",
    "rooms",
    "smallest_budget",
    "steady_reserve",
]

logger = logging.getLogger("llama_flash")

# Left unused within the budget, for what is charged to us and cannot be asked for beforehand: page tables (2 MB per
# GB of slots), thread stacks and other kernel memory, the kernel's charging in batches (256 KiB per core), growth of
# the interpreter's heap while it generates, buffers of reads, and pages of libraries that are touched later.
RESERVE_MIN = 32 << 20
RESERVE_SHARE = 0.03

# While all models decode, what they take beside flash is measured, and so is how it moves: less is left unused then.
STEADY_MIN = 8 << 20
STEADY_SHARE = 0.01
STEADY_RISES = 2  # times what was seen to be taken from one look to the next

# Beside what one load was seen to need, for a budget that is named: it must work in the next try, and as a cap.
GROWTH = 1 << 20  # of the process from one refusal to the next: what Python keeps
KERNEL = 2 << 20  # of the kernel, charged to a process' group and not to the process: stacks, inodes, batches

MACHINE = "free memory"  # the limit that is no group's

# Mapped files that count as ours: code of the interpreter and of libraries, which is needed all the time. What is
# mapped beyond that is another model's file, which the kernel can drop.
LIBRARIES_MAX = 96 << 20


@dataclass(frozen=True)
class Budget:
    """The DRAM budget of the process, in bytes, with the reason for it."""

    total: int
    reserve: int
    reason: str  # what set it: "dram_budget", "cgroup NAME" or "free memory"
    asked: int | None = None  # as the user wrote it; more than `total` where the limits allow less


@dataclass(frozen=True)
class Room:
    """What one limit leaves to this process, in bytes."""

    name: str  # "cgroup NAME", or MACHINE
    limit: int
    others: int  # held by others, below the same limit
    held: int = 0  # by all below the limit
    droppable: int = 0  # page cache beside that
    group: Path | None = None  # the memory group, if it is one

    @property
    def bytes(self) -> int:
        return max(0, self.limit - self.others)

    @property
    def libraries(self) -> int:
        """Bytes of mapped files that may be ours and count here: what was first touched elsewhere counts there."""
        return LIBRARIES_MAX if self.group is None else min(self.droppable, LIBRARIES_MAX)

    @property
    def key(self) -> str:
        """Names the limit; groups of one name may be nested."""
        return str(self.group or self.name)


@dataclass(frozen=True)
class Breakdown:
    """Where the budget goes, in bytes."""

    interpreter: int = 0  # and libraries, other models, the engine's own heap (vocabulary, ...)
    weights: int = 0  # resident
    kv: int = 0  # KV cache and recurrent state
    compute: int = 0  # graph and work buffers
    outputs: int = 0  # logits and embeddings, the engine's and numpy's
    draft: int = 0  # a draft model, or the file's head: weights, KV cache and buffers
    reserve: int = 0
    slots: int = 0  # experts from flash
    pinned: int = 0  # panels that never leave
    stream: int = 0  # ring through which panels and prompts stream
    bookkeeping: int = 0  # of the plugin

    @property
    def fixed(self) -> int:
        """All but the reserve and what belongs to flash."""
        return self.interpreter + self.weights + self.beside_weights

    @property
    def beside_weights(self) -> int:
        """What a model takes beside its weights and flash."""
        return self.kv + self.compute + self.outputs + self.draft

    @property
    def flash(self) -> int:
        return self.slots + self.pinned + self.stream + self.bookkeeping

    @property
    def total(self) -> int:
        return self.fixed + self.reserve + self.flash

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        return ", ".join(f"{name} {format_size(size)}" for name, size in self.as_dict().items() if size)


def default_reserve(total: int) -> int:
    """Reserve of a budget of `total` bytes, where the user does not set one."""
    return max(RESERVE_MIN, int(total * RESERVE_SHARE))


def steady_reserve(total: int, rise: int) -> int:
    """Reserve of a budget of `total` bytes while models decode.

    rise: bytes, the most that was taken beside flash from one look to the next.
    """
    return min(default_reserve(total), max(STEADY_MIN, int(total * STEADY_SHARE)) + STEADY_RISES * rise)


def reserve_of(total: int, reserve: int | str | None, rise: int | None = None) -> int:
    """Bytes of a budget of `total` bytes that are left alone.

    Args:
        reserve: as in FlashOffload.
        rise: see steady_reserve; None: models do not decode, or too little was seen.
    """
    if reserve is None:
        return default_reserve(total) if rise is None else steady_reserve(total, rise)
    return 0 if reserve == 0 else parse_size(reserve)


def held_by_process(root: Path = Path("/"), pid: int | Literal["self"] = "self", libraries: int = LIBRARIES_MAX) -> int:
    """Bytes that the process takes now: anonymous and shared memory, page tables, code in use.

    libraries: of mapped files, so many bytes at most.
    """
    memory = process_memory(root, pid)
    return memory.held + min(memory.file, libraries)


def rooms(
    root: Path = Path("/"), pid: int | Literal["self"] = "self", controller: Controller | None = None
) -> list[Room]:
    """What the machine and each memory group with a limit leave to process `pid`, the machine first."""
    own = process_memory(root, pid).held
    machine = machine_memory(root)
    held = max(0, machine.total - machine.available)
    result = [Room(MACHINE, machine.total, max(0, held - own), held)]
    for group in memory_groups(root, pid, controller):
        if group.limit is not None:
            others = max(0, group.held - own)
            name = f"cgroup {group.path.name}"
            result.append(Room(name, group.limit, others, group.held, group.usage - group.held, group.path))
    return result


def resolve_budget(
    dram_budget: int | str = "auto",
    reserve: int | str | None = None,
    *,
    model_bytes: int | None = None,
    root: Path = Path("/"),
    pid: int | Literal["self"] = "self",
) -> Budget:
    """The budget of process `pid`.

    Args:
        dram_budget: "auto", bytes, a size, or a share of `model_bytes` ("50%").
        reserve: bytes or a size; None: `default_reserve`.
        model_bytes: size of the model's files.
        root: root of the file system whose /proc and /sys are read.

    Raises:
        ValueError: not a size.
    """
    tightest = min(rooms(root, pid), key=lambda room: room.bytes)
    available, reason = tightest.bytes, tightest.name
    if dram_budget == "auto":
        total, asked = available, None
    else:
        asked = parse_size(dram_budget, reference=model_bytes)
        total = min(asked, available)
        if asked <= available:
            reason = "dram_budget"
    return Budget(total, reserve_of(total, reserve), reason, asked)


def kept_budget(dram_budget: int | str, reserve: int | str | None, model_bytes: int) -> Budget:
    """resolve_budget for this process, with a warning where there is less than was asked for."""
    budget = resolve_budget(dram_budget, reserve, model_bytes=model_bytes)
    if budget.asked is not None and budget.asked > budget.total:
        logger.warning(
            "dram_budget is %s, but %s leaves %s: that is used",
            format_size(budget.asked),
            budget.reason,
            format_size(budget.total),
        )
    return budget


def smallest_budget(needed: int, reserve: int | str | None = None) -> int:
    """Smallest budget, in bytes, that leaves `needed` bytes beside its reserve; rounded up to whole MiB."""
    if reserve is None:
        total = max(needed + RESERVE_MIN, int(needed / (1 - RESERVE_SHARE)) + 1)
    else:
        total = needed + reserve_of(0, reserve)
    return -(-total // (1 << 20)) << 20


def refuse(
    budget: Budget,
    breakdown: Breakdown,
    flash_needed: int,
    reserve: int | str | None,
    *,
    smallest: int | None = None,
    advice: Sequence[str] = (),
) -> FlashBudgetError:
    """The error for a budget that leaves less than the `flash_needed` bytes without which nothing can be computed.

    Args:
        smallest: the smallest budget that works, in bytes, whole MiB; None: the one that follows from the breakdown.
        advice: whole sentences on what cannot leave memory and what would need less (advice.py).
    """
    if smallest is None:
        smallest = smallest_budget(breakdown.fixed + flash_needed, reserve) + GROWTH + KERNEL
    parts = replace(breakdown, stream=flash_needed)
    limit = "" if budget.reason == "dram_budget" else f" ({budget.reason})"
    said = (
        f"a DRAM budget of {format_size(budget.total)}{limit} is too small: {parts}.",
        f"The smallest that works is {smallest >> 20} MiB.",
        *advice,
    )
    return FlashBudgetError(
        " ".join(said),
        breakdown=parts.as_dict(),
        smallest=smallest,
        advice=advice,
    )
