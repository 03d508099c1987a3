"""How locally consistent a trace's routing is, and what cache that advises: SRP and SCH.

The two metrics of "Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models"
(Liang et al., ICLR 2026, arXiv 2505.16056), of a trace's decoded tokens. The unit is an expert of a layer, or a neuron,
not a record: a layer's tensors share their experts, so one of them tells all.

SRP, segment routing best performance (section 2.2, appendix C.1): a router that decides once for each expert and each
segment of m tokens, instead of for each token, mimics the model's. Its F1 score over all experts and all segments, at
every position, is largest where it chooses the experts that at least alpha of the segment's tokens use; SRP is that
largest F1, over alpha. How many experts it chooses then, in those that a token uses, is its size ratio.

SCH, segment cache best hit rate (section 2.3 of version 3 and later): the hit rate of a cache that gets what a token
asks for and then lets go of what the next m tokens use least, of experts that this token has not used. Between equals
the one that was used last stays, as in the authors' scripts. Version 1 of the paper chose a fixed set for each segment
instead. All layers share the slots here, as in the plugin. A first use is a miss; the authors' scripts count it as a
hit while there are empty slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .trace import Ints, Trace

__all__ = ["BALANCED", "SEGMENTS", "Advice", "Consistency", "Routing", "advise", "consistency", "routing_of"]

SEGMENTS = (4, 16, 64)  # tokens; those that the paper shows
ADVISED_BY = 16  # of these, the one that cache sizes are advised by: from here on models keep their order (section 3.2)
BALANCED = 2.0  # cache in those experts that a token uses, which the paper finds to balance hits and size

Used = npt.NDArray[np.bool_]  # [tokens, experts of a layer]


@dataclass(frozen=True)
class Routing:
    """Which experts (or neurons) the tokens used that were decoded one by one, and by all layers."""

    layers: tuple[Used, ...]
    begins: tuple[int, ...]  # tokens that do not follow the one before them; the first is one
    expert_bytes: float  # slots of an expert, of all the layer's tensors, on average

    @property
    def n_tokens(self) -> int:
        return len(self.layers[0]) if self.layers else 0

    @property
    def n_experts(self) -> int:
        """Of all layers."""
        return sum(layer.shape[1] for layer in self.layers)

    @property
    def used_by_token(self) -> float:
        """Experts of all layers, on average."""
        return sum(int(layer.sum()) for layer in self.layers) / max(1, self.n_tokens)


@dataclass(frozen=True)
class Consistency:
    """Of segments of some tokens."""

    segment: int  # tokens
    srp: float  # of all layers
    layers: tuple[float, float]  # the least and the largest of a layer
    size_ratio: float  # experts that the best segment router chooses, in those that a token uses
    sch: tuple[float, ...]  # by cache size, as asked

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Advice:
    """A cache that balances hits and size."""

    ratio: float  # in those experts that a token uses
    share: float  # of all experts
    experts: int  # of all layers
    bytes: int  # of their slots
    sch: float  # there
    times: float | None  # what a slot up to there saves, in what one beyond it saves; None: there is none beyond

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def routing_of(trace: Trace) -> Routing | None:
    """The trace's tokens that were decoded one by one; None: there are none, or several kinds of records.

    Ops of several tokens (prompts, drafts) do not say which token used what: they end a run of tokens.
    """
    first: dict[int, int] = {}  # by group: the tensor that tells for all
    for number in trace.tensor.tolist():
        first.setdefault(trace.tensors[number].group, number)
    single = trace.n_tokens == 1
    tokens: Ints | None = None
    for number in first.values():
        mine = np.unique(trace.token[single & (trace.tensor == number)])
        tokens = mine if tokens is None else np.intersect1d(tokens, mine)
    if tokens is None or not len(tokens) or len({trace.tensors[n].neurons for n in first.values()}) > 1:
        return None
    layers = tuple(_used(trace, number, single, tokens) for number in first.values())
    n_bytes = sum(t.n_records * t.record_bytes for t in trace.tensors if t.group in first)
    begins = np.flatnonzero(np.append(True, np.diff(tokens) != 1))
    return Routing(layers, tuple(begins.tolist()), n_bytes / sum(layer.shape[1] for layer in layers))


def _used(trace: Trace, number: int, single: Used, tokens: Ints) -> Used:
    ops = single & (trace.tensor == number) & np.isin(trace.token, tokens)
    of_access = np.repeat(ops, np.diff(trace.begin))
    row = np.searchsorted(tokens, np.repeat(trace.token, np.diff(trace.begin))[of_access])
    used = np.zeros((len(tokens), trace.tensors[number].n_records), np.bool_)
    used[row, trace.record[of_access]] = True
    return used


def consistency(
    routing: Routing, shares: Sequence[float], segments: Sequence[int] = SEGMENTS, *, skip: int = 0
) -> list[Consistency]:
    """SRP, and SCH with slots for each of `shares` of all experts, by length of segment.

    Args:
        segments: tokens; those longer than any run of tokens are left out.
        skip: first tokens that SCH replays and does not count.
    """
    found = []
    for segment in segments:
        counts = [_activity(layer, routing.begins, segment) for layer in routing.layers]
        if not sum(int(count.sum()) for count in counts):
            continue
        srp, ratio = _srp(np.sum(counts, axis=0))
        by_layer = [_srp(count)[0] for count in counts]
        sizes = [slots_of(routing, share) for share in shares]
        rates = tuple(hit_rate(routing, size, segment, skip=skip) for size in sizes)
        found.append(Consistency(segment, srp, (min(by_layer), max(by_layer)), ratio, rates))
    return found


def slots_of(routing: Routing, share: float) -> int:
    """Experts that slots for this share of all of them hold."""
    return max(1, int(share * routing.n_experts))


def _activity(layer: Used, begins: Sequence[int], segment: int) -> Ints:
    """By number of tokens, 0 to `segment`: pairs of an expert and a segment of which so many tokens use it."""
    counts = np.zeros(segment + 1, np.int64)
    for begin, end in zip(begins, [*begins[1:], len(layer)], strict=True):
        if end - begin >= segment:
            sums = np.cumsum(np.vstack([np.zeros_like(layer[:1]), layer[begin:end]]), axis=0, dtype=np.int32)
            counts += np.bincount((sums[segment:] - sums[:-segment]).ravel(), minlength=segment + 1)
    return counts


def _srp(counts: Ints) -> tuple[float, float]:
    """The largest F1 of a segment router, and its size ratio, given _activity."""
    segment = len(counts) - 1
    uses = counts * np.arange(segment + 1)
    total = int(uses.sum())
    if not total:
        return 0.0, 0.0
    chosen = np.cumsum(counts[::-1])[::-1] * segment  # by alpha, the least activity that is chosen
    right = np.cumsum(uses[::-1])[::-1]
    f1 = 2 * right / (chosen + total)
    best = segment - int(np.argmax(f1[::-1]))  # of equals the smallest group
    return float(f1[best]), float(chosen[best] / total)


def hit_rate(routing: Routing, slots: int, segment: int, *, skip: int = 0) -> float:
    """SCH: share of the uses after the first `skip` tokens that find their expert in one of so many slots."""
    used = np.concatenate(routing.layers, axis=1)
    n_tokens, n_experts = used.shape
    ahead = used[1 : segment + 1].sum(axis=0, dtype=np.int64)  # by expert: uses in the next tokens
    last = np.full(n_experts, -1, np.int64)  # token of the last use
    there = np.zeros(n_experts, np.bool_)
    hits = asked = 0
    for token in range(n_tokens):
        now = used[token]
        if token >= skip:
            hits += int((there & now).sum())
            asked += int(now.sum())
        there |= now
        last[now] = token
        if (over := int(there.sum()) - slots) > 0:
            here = np.flatnonzero(there)
            # first what this token has not used, of that what is used least, of that what was used longest ago
            worth = ((now[here] * (segment + 1) + ahead[here]) * (n_tokens + 1) + last[here] + 1) * n_experts
            there[here[np.argpartition(worth + here, over - 1)[:over]]] = False
        if token + 1 < n_tokens:
            ahead -= used[token + 1]
        if token + 1 + segment < n_tokens:
            ahead += used[token + 1 + segment]
    return hits / asked if asked else 0.0


def advise(routing: Routing, measured: Sequence[Consistency], *, skip: int = 0) -> Advice | None:
    """The cache that SRP's size ratio asks for, and at least the paper's twice the experts of a token.

    By segments of 16 tokens, or of the longest there are; None: nothing was measured.
    """
    if not measured:
        return None
    by = max((one for one in measured if one.segment <= ADVISED_BY), key=lambda one: one.segment, default=measured[0])
    ratio = max(BALANCED, by.size_ratio)
    experts = min(routing.n_experts, round(ratio * routing.used_by_token))
    rate = hit_rate(routing, experts, by.segment, skip=skip)
    beyond = routing.n_experts - experts
    most = hit_rate(routing, routing.n_experts, by.segment, skip=skip)
    left = (most - rate) / beyond if beyond else 0.0
    return Advice(
        ratio=experts / routing.used_by_token,
        share=experts / routing.n_experts,
        experts=experts,
        bytes=round(experts * routing.expert_bytes),
        sch=rate,
        times=rate / experts / left if left > 0 else None,
    )
