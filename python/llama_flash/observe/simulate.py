"""Cache policies, replayed on traces (trace.py): what each would have hit, beside what can be hit at all.

The unit is what the cache's own is: a record, one expert's slice of one tensor, or a neuron. Records of one size class
share its slots. A prompt (an op of more than 16 tokens) uses what is there and fills empty slots, but evicts nothing.

`lfu` is the plugin's policy (plugin/src/memory/cache.cpp), with all that its ops decide about it (ops/experts.cpp): the
reads ahead of a layer's other tensors, what an op holds, the order of records in a bucket. Its hits are those that the
plugin counts, one by one. The others take an op's records one after the other and hold nothing, so that they are a
little better off than they would be. The optimum may stream: a record is used without a slot, as the plugin's ring
allows.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .trace import DECODE_TOKENS, Ints, Run, Trace, TracedTensor

__all__ = ["POLICIES", "Result", "accesses", "as_counted", "optimum", "simulate", "slots_for"]

Hits = npt.NDArray[np.bool_]
Slots = Mapping[int, int]  # by size class

EXPERTS_HALF_LIFE = 34.0  # tokens; as in plugin/src/memory/cache.h
NEURONS_HALF_LIFE = 4.0
LEARNT = 1 / 3  # of the decoded tokens: what policies may learn from, and what is not counted


@dataclass(frozen=True)
class Result:
    """What a policy makes of a trace's decoded tokens, those after the first `skipped` ones."""

    policy: str
    share: float  # of all records, that there are slots for
    slots: int
    tokens: int
    hits: int
    misses: int
    optimum: int  # misses of Belady's

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @property
    def misses_per_token(self) -> float:
        return self.misses / max(1, self.tokens)

    @property
    def of_optimum(self) -> float | None:
        """Misses, in those of the optimum; None if it has none."""
        return self.misses / self.optimum if self.optimum else None

    def as_dict(self) -> dict[str, Any]:
        derived = {"hit_rate": self.hit_rate, "misses_per_token": self.misses_per_token, "of_optimum": self.of_optimum}
        return {**asdict(self), **derived}


def simulate(trace: Trace, share: float, policies: list[str], *, skip: float = LEARNT) -> list[Result]:
    """Replays the trace with slots for `share` of the records of each class.

    Counted is what is decoded after the first `skip` of it.

    Raises:
        ValueError: a policy that does not exist, or nothing is left to count.
    """
    for name in policies:
        if name not in POLICIES:
            raise ValueError(f"no such policy: {name!r}; there are {', '.join(POLICIES)}")
    slots = slots_for(trace, share)
    first, last = _token_range(trace)
    after = first + skip * (last - first)
    counted = trace.decode & (trace.token > after)
    if not counted.any():
        raise ValueError(f"the trace has no decoded token after the first {skip:.0%} of them")
    of_record = np.repeat(counted, np.diff(trace.begin))
    total = int(of_record.sum())
    per_tensor = np.bincount(trace.tensor[counted], trace.n_tokens[counted])
    tokens = int(per_tensor[per_tensor > 0].min())
    best = total - int(optimum(trace, slots)[of_record].sum())
    results = []
    for name in policies:
        misses = best if name == "optimum" else total - int(POLICIES[name](trace, slots)[of_record].sum())
        results.append(Result(name, share, sum(slots.values()), tokens, total - misses, misses, best))
    return results


def slots_for(trace: Trace, share: float) -> dict[int, int]:
    """Slots by size class, the same share of each."""
    records: dict[int, int] = {}
    for tensor in trace.tensors:
        records[tensor.size_class] = records.get(tensor.size_class, 0) + tensor.n_records
    return {size_class: max(1, int(share * n)) for size_class, n in records.items()}


def as_counted(trace: Trace) -> tuple[Run, Run] | None:
    """What the traced run counted, and what `lfu` makes of the whole trace with its slots; None: not comparable.

    Not comparable is a run that more than the trace has decided (`Run.exact`), or one of whose ops asked for more than
    the slots hold, together with the layer's other tensors: then it depends on when reads arrive what is streamed.
    """
    if trace.run is None or not trace.run.exact or not _has_room(trace, trace.run.slots):
        return None
    hits = int(POLICIES["lfu"](trace, trace.run.slots).sum())
    return trace.run, replace(trace.run, hits=hits, misses=len(trace.record) - hits)


def _has_room(trace: Trace, slots: Slots) -> bool:
    """Whether the slots hold what any decoding op asks for, for all tensors of its layer; of neurons twice as much."""
    for i in np.flatnonzero(trace.decode).tolist():
        tensor = trace.tensors[trace.tensor[i]]
        sharing = sum(1 for t in trace.tensors if (t.group, t.size_class) == (tensor.group, tensor.size_class))
        asked = int(trace.begin[i + 1] - trace.begin[i]) * (2 if tensor.neurons else sharing)
        if asked > slots[tensor.size_class]:
            return False
    return True


def _token_range(trace: Trace) -> tuple[int, int]:
    """Numbers of the token before the first decoded one, and of the last."""
    if not trace.decode.any():
        return 0, 0
    tokens = trace.token[trace.decode]
    return int((tokens - trace.n_tokens[trace.decode]).min()), int(tokens.max())


# access by access: one record after the other, each class for itself

Access = Callable[[int, bool], bool]  # (record, may evict) -> hit


def accesses(trace: Trace) -> tuple[Ints, Ints, Hits]:
    """By access: the record's number among all tensors', its size class, and whether its op may evict."""
    first = np.concatenate([[0], np.cumsum([tensor.n_records for tensor in trace.tensors])]).astype(np.int64)
    classes = np.array([tensor.size_class for tensor in trace.tensors], np.int64)
    of_access = np.repeat(trace.tensor, np.diff(trace.begin))
    return first[of_access] + trace.record, classes[of_access], np.repeat(trace.decode, np.diff(trace.begin))


def _by_access(make: Callable[[Trace, int, Ints], Access]) -> Callable[[Trace, Slots], Hits]:
    """A policy of all classes, from one of a class: make(trace, slots, numbers of the class's accesses)."""

    def policy(trace: Trace, slots: Slots) -> Hits:
        record, classes, decode = accesses(trace)
        hits = np.zeros(len(record), np.bool_)
        for size_class, n in slots.items():
            mine = np.flatnonzero(classes == size_class)
            access = make(trace, n, mine)
            hits[mine] = [
                access(r, evict) for r, evict in zip(record[mine].tolist(), decode[mine].tolist(), strict=True)
            ]
        return hits

    return policy


def _lru(_trace: Trace, n_slots: int, _mine: Ints) -> Access:
    cache: OrderedDict[int, None] = OrderedDict()

    def access(record: int, evict: bool) -> bool:
        if record in cache:
            cache.move_to_end(record)
            return True
        if len(cache) == n_slots:
            if not evict:
                return False
            cache.popitem(last=False)
        cache[record] = None
        return False

    return access


def _segmented_lru(_trace: Trace, n_slots: int, _mine: Ints) -> Access:
    """A record that is hit moves to a protected part, four fifths of the slots; what leaves it has another chance."""
    protected_slots = int(0.8 * n_slots)
    probation: OrderedDict[int, None] = OrderedDict()
    protected: OrderedDict[int, None] = OrderedDict()

    def access(record: int, evict: bool) -> bool:
        if record in protected:
            protected.move_to_end(record)
            return True
        if record in probation:
            del probation[record]
            protected[record] = None
            if len(protected) > protected_slots:
                demoted, _ = protected.popitem(last=False)
                probation[demoted] = None
            return True
        if len(probation) + len(protected) == n_slots:
            if not evict:
                return False
            (probation or protected).popitem(last=False)
        probation[record] = None
        return False

    return access


def _s3_fifo(_trace: Trace, n_slots: int, _mine: Ints) -> Access:
    """Yang et al., SOSP 2023: a small FIFO (a tenth), a main FIFO with 2-bit counts, a list of those lately dropped."""
    small_slots = max(1, n_slots // 10)
    small: deque[int] = deque()
    main: deque[int] = deque()
    ghost: OrderedDict[int, None] = OrderedDict()
    count: dict[int, int] = {}  # of what is in the cache

    def evict_one() -> None:
        while True:
            if small and (len(small) >= small_slots or not main):
                record = small.popleft()
                if count[record] > 1:
                    main.append(record)
                    count[record] = 0
                    continue
                ghost[record] = None
                if len(ghost) > n_slots:
                    ghost.popitem(last=False)
            else:
                record = main.popleft()
                if count[record] > 0:
                    count[record] -= 1
                    main.append(record)
                    continue
            del count[record]
            return

    def access(record: int, evict: bool) -> bool:
        if record in count:
            count[record] = min(3, count[record] + 1)
            return True
        if len(count) == n_slots:
            if not evict:
                return False
            evict_one()
        if record in ghost:
            del ghost[record]
            main.append(record)
        else:
            small.append(record)
        count[record] = 0
        return False

    return access


def _static(trace: Trace, n_slots: int, mine: Ints) -> Access:
    """Those most used in the trace's first third, from their first use on, and no others."""
    first, last = _token_range(trace)
    learnt = np.repeat(trace.token <= first + LEARNT * (last - first), np.diff(trace.begin))[mine]
    record, _, _ = accesses(trace)
    uses = np.bincount(record[mine][learnt], trace.uses[mine][learnt])
    pinned = set(np.argsort(-uses, kind="stable")[:n_slots].tolist())
    read: set[int] = set()

    def access(record: int, _evict: bool) -> bool:
        hit = record in read
        if record in pinned:
            read.add(record)
        return hit

    return access


def _window(trace: Trace, n_slots: int, mine: Ints) -> Access:
    """The paper's: what none of the last k tokens used goes.

    k is the longest window that had room in the trace's first third. What has no room later is the oldest.
    """
    first, last = _token_range(trace)
    times = np.repeat(trace.token, np.diff(trace.begin))[mine]
    records, _, decode = accesses(trace)
    learnt = decode[mine] & (times <= first + LEARNT * (last - first))
    window = _longest_window(times[learnt].tolist(), records[mine][learnt].tolist(), n_slots)
    cache: OrderedDict[int, int] = OrderedDict()  # oldest first: token of the last use
    tokens = iter(times.tolist())

    def access(record: int, evict: bool) -> bool:
        now = next(tokens)
        while cache and next(iter(cache.values())) < now - window:
            cache.popitem(last=False)
        hit = record in cache
        if not hit and len(cache) == n_slots:
            if not evict:
                return False
            cache.popitem(last=False)
        cache[record] = now
        cache.move_to_end(record)
        return hit

    return access


def _longest_window(token: list[int], record: list[int], n_slots: int) -> int:
    """The most tokens before the current one whose records never took more than n_slots; 1 at least."""
    low, high = 1, max(1, (token[-1] - token[0]) if token else 1)
    while low < high:
        window = (low + high + 1) // 2
        cache: OrderedDict[int, int] = OrderedDict()
        most = 0
        for now, used in zip(token, record, strict=True):
            while cache and next(iter(cache.values())) < now - window:
                cache.popitem(last=False)
            cache[used] = now
            cache.move_to_end(used)
            most = max(most, len(cache))
            if most > n_slots:
                break
        low, high = (low, window - 1) if most > n_slots else (window, high)
    return low


def optimum(trace: Trace, slots: Slots) -> Hits:
    """Belady's: after each op, of what was there and what it asked for, what is used again last goes.

    No cache of so many slots reads less over the whole trace, whatever it knows.
    """
    record, classes, _ = accesses(trace)
    op = np.repeat(np.arange(len(trace.token)), np.diff(trace.begin))
    hits = np.zeros(len(record), np.bool_)
    for size_class, n_slots in slots.items():
        mine = np.flatnonzero(classes == size_class)
        last_of_op = np.append(np.diff(op[mine]) != 0, True)[: len(mine)].tolist()
        cache: dict[int, int] = {}  # when it is used next
        farthest: list[tuple[int, int]] = []  # (-next, record); stale entries stay until they come up
        here = []
        for used, following, end in zip(
            record[mine].tolist(), next_use(record[mine]).tolist(), last_of_op, strict=True
        ):
            here.append(used in cache)
            cache[used] = following
            heapq.heappush(farthest, (-following, used))
            while end and len(cache) > n_slots:
                when, victim = heapq.heappop(farthest)
                if cache.get(victim) == -when:
                    del cache[victim]
        hits[mine] = here
    return hits


def next_use(record: Ints) -> Ints:
    """By access: number of the record's next one; more than there are: none, each a number of its own."""
    n = len(record)
    order = np.argsort(record, kind="stable")
    result = np.empty(n, np.int64)
    same = np.append(record[order][1:] == record[order][:-1], False)[:n]
    result[order] = np.where(same, np.append(order[1:], 0)[:n], n + order)
    return result


# the plugin's policy, op by op


class _AgeingCache:
    """plugin/src/memory/cache.h for one session; a slot's number does not matter, so records stand for slots.

    Within a class, what goes is the least (bucket, time of entering it): buckets that fall into the lowest one keep
    that order.
    """

    BUCKETS, PER_OCTAVE, SCALE_BEGIN = 256, 4.0, 16.0

    def __init__(self, slots: Slots, size_class: list[int], half_life: float, admit: bool = False) -> None:
        self.ageing = 1.0 / half_life
        self.admit = admit
        self.n_slots = dict(slots)
        self.empty = dict(slots)
        self.class_of = size_class  # by record
        self.score = [-math.inf] * len(size_class)
        self.place: list[tuple[int, int] | None] = [None] * len(size_class)  # in a bucket; None: held, or in no slot
        self.cached = [False] * len(size_class)
        self.order: dict[int, list[tuple[int, int, int]]] = {
            c: [] for c in slots
        }  # a heap of (*place, record), some stale
        self.lowest = dict.fromkeys(slots, 0)
        self.entered = 0
        self.holding: dict[int, None] = {}

    def use(self, record: int, now: int, n_tokens: int, count: int) -> None:
        ageing = self.ageing
        added = count / n_tokens * (1.0 - 2.0 ** (-ageing * n_tokens)) / (1.0 - 2.0**-ageing)
        origin = ageing * now
        self.score[record] = origin + math.log2(2.0 ** (self.score[record] - origin) + added)

    def bucket(self, record: int) -> int:
        x = (self.score[record] + self.SCALE_BEGIN) * self.PER_OCTAVE
        lowest = self.lowest[self.class_of[record]]
        return int(x) if x > lowest else lowest

    def hold(self, record: int) -> None:
        self.holding.pop(record, None)
        self.holding[record] = None
        self.place[record] = None

    def take(self, record: int, evict: bool) -> bool:
        c = self.class_of[record]
        if self.empty[c]:
            self.empty[c] -= 1
        else:
            heap = self.order[c]
            while evict and heap and self.place[heap[0][2]] != heap[0][:2]:
                heapq.heappop(heap)
            if not evict or not heap or (self.admit and heap[0][0] > self.bucket(record)):
                return False
            victim = heapq.heappop(heap)[2]
            self.cached[victim] = False
            self.place[victim] = None
        self.cached[record] = True
        self.holding[record] = None
        return True

    def end_op(self) -> None:
        for record in self.holding:
            c = self.class_of[record]
            bucket = self.bucket(record)
            self.lowest[c] = max(self.lowest[c], bucket - self.BUCKETS + 1)
            self.entered += 1
            place = (bucket, self.entered)
            self.place[record] = place
            heapq.heappush(self.order[c], (*place, record))
        self.holding.clear()


def _count_of_rank(counts: list[int], rank: int) -> int:
    """Fewer than `rank` + 1 of the counts are at least so many."""
    return 0 if rank >= len(counts) else sorted(counts, reverse=True)[rank] + 1


def _ageing(admit: bool) -> Callable[[Trace, Slots], Hits]:
    """admit: what would go before all that is there is streamed, and gets no slot."""

    def policy(trace: Trace, slots: Slots) -> Hits:
        hits = np.zeros(len(trace.record), np.bool_)
        for neurons in (False, True):  # two caches
            mine = {
                c: n for c, n in slots.items() if any(t.size_class == c and t.neurons == neurons for t in trace.tensors)
            }
            if mine:
                _replay_ageing(trace, mine, neurons, admit, hits)
        return hits

    return policy


def _replay_ageing(trace: Trace, slots: Slots, neurons: bool, admit: bool, hits: Hits) -> None:
    tensors = trace.tensors
    half_life = NEURONS_HALF_LIFE if neurons else EXPERTS_HALF_LIFE
    first = np.concatenate([[0], np.cumsum([tensor.n_records for tensor in tensors])]).tolist()
    class_of = [tensor.size_class for tensor in tensors for _ in range(tensor.n_records)]
    cache = _AgeingCache(slots, class_of, half_life, admit)
    in_class = {c: sum(1 for tensor in tensors if tensor.size_class == c) for c in slots}
    asked_before: dict[int, int] = {}  # tensors, in the order in which they were first used
    fetched = [False] * len(class_of)  # read for an op that has not asked for it yet

    for i, (now, n_tokens, number) in enumerate(
        zip(trace.token.tolist(), trace.n_tokens.tolist(), trace.tensor.tolist(), strict=True)
    ):
        tensor = tensors[number]
        if tensor.neurons != neurons:
            continue
        begin, end = int(trace.begin[i]), int(trace.begin[i + 1])
        ids, counts = trace.record[begin:end].tolist(), trace.uses[begin:end].tolist()
        asked_before.setdefault(number, len(asked_before))
        decode = n_tokens <= DECODE_TOKENS
        records = [first[number] + k for k in ids]
        for record, count in zip(records, counts, strict=True):
            cache.use(record, now, n_tokens, count)
        if neurons:
            hits[begin:end] = _ask_neurons(cache, records, max(1, slots[tensor.size_class] // 2))
            continue

        for k, record in enumerate(records):
            hits[begin + k] = cache.cached[record] and not fetched[record]
            fetched[record] = False
            if cache.cached[record]:
                cache.hold(record)

        def to_slot(record: int, count: int, decode: bool = decode, counts: list[int] = counts) -> bool:
            if decode:
                return cache.take(record, True)
            c = class_of[record]
            share = cache.n_slots[c] // in_class[c]
            return cache.empty[c] > 0 and count >= _count_of_rank(counts, share) and cache.take(record, False)

        later = _asked_later(tensors, asked_before, number)
        for other in later if decode else ():
            for k in ids:
                if cache.cached[first[other] + k]:
                    cache.hold(first[other] + k)
        streaming = False
        for record, count in zip(records, counts, strict=True):
            if not cache.cached[record]:
                streaming = (not to_slot(record, count) and not admit) or streaming
        for other in later:
            for k, count in zip(ids, counts, strict=True):
                record = first[other] + k
                if not cache.cached[record]:
                    if not (decode and streaming):
                        to_slot(record, count)
                    fetched[record] = True
        cache.end_op()


def _ask_neurons(cache: _AgeingCache, records: list[int], most: int) -> list[bool]:
    """An op of a layer's bundles, `most` of them at a time; by record, whether it was there."""
    found: list[bool] = []
    for at in range(0, len(records), most):
        if at:
            cache.end_op()
        chunk = records[at : at + most]
        there = [bool(cache.cached[record]) for record in chunk]
        found += there
        for record, here in zip(chunk, there, strict=True):
            if here:
                cache.hold(record)
        for record, here in zip(chunk, there, strict=True):
            if not here:
                cache.take(record, True)
    cache.end_op()
    return found


def _asked_later(tensors: Sequence[TracedTensor], asked_before: Mapping[int, int], number: int) -> list[int]:
    """The layer's other tensors that will ask for the same experts."""
    tensor, order = tensors[number], asked_before[number]
    return [
        other
        for other, at in asked_before.items()
        if at > order and tensors[other].group == tensor.group and tensors[other].n_records == tensor.n_records
    ]


POLICIES: dict[str, Callable[[Trace, Slots], Hits]] = {
    "lru": _by_access(_lru),
    "window": _by_access(_window),
    "slru": _by_access(_segmented_lru),
    "s3fifo": _by_access(_s3_fifo),
    "static": _by_access(_static),
    "lfu": _ageing(False),
    "admit": _ageing(True),
    "optimum": optimum,
}
