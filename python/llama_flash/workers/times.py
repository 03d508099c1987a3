"""Layers divided by the time that they are expected to take: workers compute in turn, so it is the sum that counts.

A worker reads from its drive while it computes, so its part takes as long as the slower of the two. Of what could stay
on flash, the share that has no room in memory is read; of a mixture less, since the experts used most are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["LEAST_FLASH", "NONE", "Host", "Layer", "added", "divide_by_time", "seconds_of"]

LEAST_FLASH = 16 << 20  # bytes for slots and a ring, about: the plugin says exactly, when it is loaded
_TIE = 0.01  # of the time of all: where it is the same, layers follow the room


@dataclass(frozen=True)
class Layer:
    """Bytes of a layer, or of several."""

    size: int  # weights and KV cache
    least: int  # of these, what has to be in memory
    touched: float  # weights that a token is computed with
    drawn: float  # of these, what could be on flash
    skewed: bool = False  # whether some are used more than others: experts


@dataclass(frozen=True)
class Host:
    """What a worker has for layers."""

    room: int  # bytes
    flash: float  # bytes per second of its drive
    dram: float  # bytes per second of its memory


NONE = Layer(0, 0, 0.0, 0.0)


def added(one: Layer, other: Layer, sign: int = 1) -> Layer:
    """Both together; sign: -1: one without the other, which is a part of it."""
    return Layer(
        one.size + sign * other.size,
        one.least + sign * other.least,
        one.touched + sign * other.touched,
        one.drawn + sign * other.drawn,
        one.skewed or other.skewed,
    )


def seconds_of(layers: Layer, host: Host) -> float:
    """Of a token; infinite where what has to be in memory has no room, slots included if not all fits."""
    if layers.least + (LEAST_FLASH if layers.size > host.room else 0) > host.room:
        return math.inf
    movable = layers.size - layers.least
    miss = max(0.0, 1.0 - (host.room - layers.least) / movable) if movable else 0.0
    if layers.skewed:
        miss *= miss
    return max(layers.touched / host.dram, layers.drawn * miss / host.flash)


def divide_by_time(layers: Sequence[Layer], hosts: Sequence[Host]) -> list[range]:
    """Neighbouring layers for each host, in order, so that a token takes as little time as can be; at least one each.

    Empty where they have no room.
    """
    n = len(layers)
    so_far = list(accumulate(layers, added, initial=NONE))
    room = sum(max(1, host.room) for host in hosts)
    whole = sum(each.touched for each in layers) / max(host.dram for host in hosts)

    def cost(host: Host, begin: int, end: int) -> float:
        part = added(so_far[end], so_far[begin], -1)
        even = (part.size / max(1, so_far[n].size)) ** 2 * room / max(1, host.room)  # 1 in all, if sizes are as rooms
        return seconds_of(part, host) + _TIE * whole * even

    # best[end]: of the first layers up to there at the hosts so far, and where the last one's begin
    best: list[tuple[float, int]] = [(0.0, 0)] + [(math.inf, 0)] * n
    chosen: list[list[tuple[float, int]]] = []
    for i, host in enumerate(hosts):
        best = [
            min(((best[b][0] + cost(host, b, end), b) for b in range(i, end)), default=(math.inf, 0))
            for end in range(n + 1)
        ]
        chosen.append(best)
    if not math.isfinite(best[n][0]):
        return []
    ranges, end = [], n
    for of in reversed(chosen):
        ranges.append(range(of[end][1], end))
        end = ranges[-1].start
    return ranges[::-1]
