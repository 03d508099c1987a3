"""Which worker has which layers, and which of their weights it keeps on flash: the client decides, before the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from ..budget.rooms import Breakdown
from ..errors import FlashWorkerError
from ..model.bundles import Bundles
from ..model.gguf import GgufMeta, TensorInfo
from ..model.graphs import Use
from ..planning.placement import kinds_of, least_for_neurons, select
from ..sizes import format_size
from .times import LEAST_FLASH, NONE, Host, Layer, added, divide_by_time, seconds_of

__all__ = ["FLASH", "MATRIX", "PLAIN", "Offer", "Part", "divide_layers", "divide_model"]

PLAIN, MATRIX, FLASH = 0, 1, 2  # enum llama_flash_home


@dataclass(frozen=True)
class Offer:
    """What a worker gives. In bytes."""

    endpoint: str
    budget: int  # of its process
    held: int  # by it before a load
    reserve: int
    flash_rate: float = 0.0  # bytes per second of its drive; 0: nobody has measured it
    dram_rate: float = 0.0  # bytes per second of its memory; the same
    other_cpu: str = ""  # what its CPU has that the client's does not, or the reverse: answers may have other bits

    @property
    def room(self) -> int:
        """For a part of a model."""
        return max(0, self.budget - self.held - self.reserve)


@dataclass(frozen=True)
class Part:
    """What one worker computes. In bytes."""

    offer: Offer
    layers: range
    homes: Mapping[str, int]  # of its weights: PLAIN, MATRIX or FLASH; a bundle is one, its predictor is none
    resident: int  # weights and predictors in memory
    on_flash: int
    kv: int  # expected
    compute: int  # expected
    seconds: float = 0.0  # of a token, expected; 0: not known

    @property
    def left(self) -> int:
        """For slots, pinned panels and rings."""
        return self.offer.room - self.resident - self.kv - self.compute


def divide_layers(sizes: Sequence[int], rooms: Sequence[int]) -> list[range]:
    """Neighbouring layers for each worker, as large as its room is among all rooms; at least one each.

    Args:
        sizes: bytes of each layer.
        rooms: bytes that each worker has; not all zero.
    """
    total, room = sum(sizes), sum(rooms)
    ranges: list[range] = []
    begin, done, share = 0, 0, 0
    for i, own in enumerate(rooms):
        share += own
        last = len(sizes) - (len(rooms) - 1 - i)  # the others need one each
        end = begin + 1
        done += sizes[begin]
        # up to the border that is nearest to its share
        while end < last and (2 * done + sizes[end]) * room <= 2 * total * share:
            done += sizes[end]
            end += 1
        if i == len(rooms) - 1:
            end = len(sizes)
        ranges.append(range(begin, end))
        begin = end
    return ranges


def divide_model(
    meta: GgufMeta,
    offers: Sequence[Offer],
    what: str,
    uses: Mapping[str, Use],
    expected: Breakdown,
    bundles: Bundles | None = None,
) -> list[Part]:
    """The parts of all workers.

    Args:
        what: as in FlashOffload.
        uses: of the weights, by the engine's graphs.
        expected: of the whole model on one machine: KV cache and graph buffers.
        bundles: the file's, which are on flash whatever else is.

    Raises:
        FlashWorkerError: there are more workers than layers, or one has too little memory.
    """
    layers: dict[int, list[TensorInfo]] = {}
    for tensor in meta.tensors.values():
        if tensor.layer is not None:
            layers.setdefault(tensor.layer, []).append(tensor)
    n = len(layers)
    if sorted(layers) != list(range(n)) or n < len(offers):
        raise FlashWorkerError(f"a model of {n} layers cannot be divided among {len(offers)} workers: name fewer")
    beside = [t for t in meta.tensors.values() if t.name.startswith("rope_f")]  # used by all layers
    costs = _layers(meta, [layers[i] for i in range(n)], what, uses, expected.kv // n, bundles)
    by_time = all(o.flash_rate > 0 and o.dram_rate > 0 for o in offers)
    hosts = [Host(o.room - expected.compute, o.flash_rate, o.dram_rate) for o in offers]
    ranges = divide_by_time(costs, hosts) if by_time else []
    ranges = ranges or divide_layers([each.size for each in costs], [max(1, o.room) for o in offers])
    parts = []
    for offer, host, mine in zip(offers, hosts, ranges, strict=True):
        weights = [t for i in mine for t in layers[i]] + beside
        kv = expected.kv * len(mine) // n
        own = None if bundles is None else bundles.of_layers(mine)
        part = _part(meta, offer, mine, weights, what, uses, kv, expected.compute, own)
        if by_time:
            part = replace(part, seconds=seconds_of(reduce(added, costs[mine.start : mine.stop], NONE), host))
        parts.append(part)
    return parts


def _layers(
    meta: GgufMeta,
    layers: Sequence[Sequence[TensorInfo]],
    what: str,
    uses: Mapping[str, Use],
    kv: int,
    bundles: Bundles | None,
) -> list[Layer]:
    """What each costs, with as much on flash as may be. kv: bytes of one."""
    movable = {t.name for t in select(meta, list(kinds_of(what))[-1], uses)} | _bundled(bundles)
    used = meta.number("expert_used_count") / max(1, meta.number("expert_count"))
    found = []
    for weights in layers:
        experts = sum(t.size for t in weights if uses.get(t.name) == Use.MUL_MAT_ID)
        size = sum(t.size for t in weights)
        least = kv + sum(t.size for t in weights if t.name not in movable)
        touched = {t.name: t.size * (used if uses.get(t.name) == Use.MUL_MAT_ID else 1) for t in weights}
        drawn = sum(n_bytes for name, n_bytes in touched.items() if name in movable)
        found.append(Layer(size + kv, least, sum(touched.values()), drawn, experts > 0))
    return found


def _part(
    meta: GgufMeta,
    offer: Offer,
    mine: range,
    weights: Sequence[TensorInfo],
    what: str,
    uses: Mapping[str, Use],
    kv: int,
    compute: int,
    bundles: Bundles | None,
) -> Part:
    """As few kinds of weights on flash as its room needs."""
    aside = {t.name for layer in bundles.layers for t in layer.predictor or ()} if bundles else set()
    least = max(LEAST_FLASH, least_for_neurons(bundles) if bundles and bundles.layers else 0)
    for kinds in kinds_of(what):
        chosen = {t.name for t in select(meta, kinds, uses)} | _bundled(bundles)
        homes = {t.name: FLASH if t.name in chosen else _in_memory(uses.get(t.name, Use(0))) for t in weights}
        on_flash = sum(t.size for t in weights if homes[t.name] == FLASH)
        homes = {name: home for name, home in homes.items() if name not in aside}
        part = Part(offer, mine, homes, sum(t.size for t in weights) - on_flash, on_flash, kv, compute)
        if part.left >= (least if on_flash else 0):
            return part
    need = offer.budget - part.left + (least if part.on_flash else 0)
    raise FlashWorkerError(
        f"worker {offer.endpoint} has too little memory for layers {mine.start} to {mine.stop - 1}: its budget is "
        f"{format_size(offer.budget)}, about {format_size(need)} would do; give it more, or name more workers",
        host=offer.endpoint,
    )


def _bundled(bundles: Bundles | None) -> set[str]:
    return {layer.tensor.name for layer in bundles.layers} if bundles else set()


def _in_memory(use: Use) -> int:
    return MATRIX if use in (Use.MUL_MAT, Use.MUL_MAT_ID) else PLAIN
