"""slot_cache and ring against models in Python: hypothesis looks for operations after which they differ."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import pytest
from cache_shim import NONE, SETTINGS, compiled
from hypothesis import given
from hypothesis import strategies as st


def runs(operations: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Lists of all lengths: hypothesis' own are of about five, too short to fill anything."""
    return st.integers(0, 120).flatmap(lambda n: st.lists(operations, min_size=n, max_size=n))


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("shim"))


# as in cache.h
HALF_LIFE, BUCKETS_PER_OCTAVE = 34.0, 4
N_RECORDS = 16


@dataclass
class Slot:
    record: int
    size_class: int
    held: bool = True
    reading: bool = False


class CacheModel:
    """Slots that are in use, by number, and the uses of each record as (token, weight)."""

    def __init__(self, slots_per_class: list[int]) -> None:
        self.empty: list[set[int]] = []
        first = 0
        for n in slots_per_class:
            self.empty.append(set(range(first, first + n)))
            first += n
        self.members = [sorted(slots) for slots in self.empty]  # by address
        self.retired: list[list[int]] = [[] for _ in slots_per_class]  # the last one first to come back
        self.n_slots = first
        self.used: dict[int, Slot] = {}
        self.uses: dict[int, list[tuple[int, float]]] = {}

    def score(self, record: int) -> float:
        """log2 of the uses, each doubled for every half-life that has passed before it."""
        return math.log2(sum(weight * 2 ** (token / HALF_LIFE) for token, weight in self.uses[record]))

    def slot_of(self, record: int) -> int | None:
        return next((number for number, slot in self.used.items() if slot.record == record), None)

    def end_op(self) -> None:
        for slot in self.used.values():
            if slot.held and not slot.reading:
                slot.held = False

    def free(self, size_class: int) -> dict[int, Slot]:
        return {number: slot for number, slot in self.used.items() if slot.size_class == size_class and not slot.held}


# the numbers choose among what there is when the operation is carried out
CACHE_OPERATIONS = runs(
    st.one_of(
        st.tuples(st.just("use"), st.integers(0, N_RECORDS - 1), st.booleans()),
        st.tuples(st.just("use"), st.integers(0, 3), st.just(True)),
        st.tuples(st.just("end_op"), st.just(0), st.just(True)),
        st.tuples(st.just("reading"), st.integers(0, 99), st.booleans()),
        st.tuples(st.just("drop"), st.integers(0, 99), st.just(True)),
        st.tuples(st.just("pass"), st.integers(1, 16), st.just(True)),
        st.tuples(st.just("add"), st.integers(0, 2), st.just(True)),
        st.tuples(st.just("retire"), st.integers(0, 2), st.booleans()),
    ),
)


@SETTINGS
@given(slots_per_class=st.lists(st.integers(0, 5), min_size=1, max_size=3), operations=CACHE_OPERATIONS)
def test_the_least_used_record_loses_its_slot_and_none_does_while_held(
    shim: ctypes.CDLL, slots_per_class: list[int], operations: list[tuple[str, int, bool]]
) -> None:
    n_classes = len(slots_per_class)
    cache = shim.cache_new((ctypes.c_uint32 * n_classes)(*slots_per_class), n_classes, N_RECORDS)
    try:
        model, now = CacheModel(slots_per_class), 0
        for operation, number, flag in operations:
            if operation == "use":
                now += 1
                shim.cache_use(cache, number, now, 1, 1)
                model.uses.setdefault(number, []).append((now, 1.0))
                assert shim.cache_score(cache, number) == pytest.approx(model.score(number), abs=1e-9)
                slot = model.slot_of(number)
                if slot is None:
                    _take(shim, cache, model, number % n_classes, number, flag)
                else:
                    shim.cache_hold(cache, slot)
                    model.used[slot].held = True
            elif operation == "end_op":
                shim.cache_end_op(cache)
                model.end_op()
            elif operation == "pass":
                now += number
            elif operation == "add":
                _add(shim, cache, model, number % n_classes)
            elif operation == "retire":
                _retire(shim, cache, model, number % n_classes, flag)
            elif model.used:
                slot = sorted(model.used)[number % len(model.used)]
                if operation == "drop":
                    shim.cache_drop(cache, slot)
                    model.empty[model.used.pop(slot).size_class].add(slot)
                elif model.used[slot].held:  # only what is held is read into
                    shim.cache_set_reading(cache, slot, flag)
                    model.used[slot].reading = flag
            assert shim.cache_used(cache) == len(model.used)
            for slot, held in model.used.items():
                assert shim.cache_record_in(cache, slot) == held.record
    finally:
        shim.cache_free(cache)


def _take(shim: ctypes.CDLL, cache: Any, model: CacheModel, size_class: int, record: int, evict: bool) -> None:
    evicted = ctypes.c_int32(-2)
    slot = shim.cache_take(cache, size_class, record, evict, ctypes.byref(evicted))
    empty, free = model.empty[size_class], model.free(size_class)
    if empty:
        assert slot in empty, "an empty slot comes before any other"
        assert evicted.value == NONE
        empty.remove(slot)
    elif not evict or not free:
        assert slot == NONE and evicted.value == NONE
        return
    else:
        assert slot in free, "a slot that is held was given away"
        least = min(model.score(other.record) for other in free.values())
        assert model.score(free[slot].record) <= least + 1 / BUCKETS_PER_OCTAVE + 1e-6
        assert evicted.value == model.used.pop(slot).record
    model.used[slot] = Slot(record, size_class)


def _add(shim: ctypes.CDLL, cache: Any, model: CacheModel, size_class: int) -> None:
    if model.retired[size_class]:
        expected = model.retired[size_class].pop()
    else:
        expected = model.n_slots
        model.n_slots += 1
    assert shim.cache_add(cache, size_class) == expected
    model.members[size_class].append(expected)
    model.empty[size_class].add(expected)


def _retire(shim: ctypes.CDLL, cache: Any, model: CacheModel, size_class: int, move: bool) -> None:
    slot, moved, evicted = (ctypes.c_int32(-2) for _ in range(3))
    done = shim.cache_retire(cache, size_class, move, slot, moved, evicted)
    members, empty = model.members[size_class], model.empty[size_class]
    last = members[-1] if members else NONE
    there = model.used.get(last)
    stays = move or (there is not None and there.held)
    free = model.free(size_class)
    if last == NONE or (there and (there.reading or (stays and not (empty or free)))):
        assert not done
        return
    assert done and slot.value == last
    model.retired[size_class].append(members.pop())
    if there is None:
        assert (moved.value, evicted.value) == (NONE, NONE)
        empty.remove(last)
    elif not stays:
        assert (moved.value, evicted.value) == (NONE, model.used.pop(last).record)
    elif empty:
        assert moved.value in empty and evicted.value == NONE
        empty.remove(moved.value)
        model.used[moved.value] = model.used.pop(last)
    else:
        victim = last if moved.value == NONE else moved.value
        least = min(model.score(other.record) for other in free.values())
        assert model.score(free[victim].record) <= least + 1 / BUCKETS_PER_OCTAVE + 1e-6
        assert evicted.value == model.used.pop(victim).record
        if victim != last:
            model.used[victim] = model.used.pop(last)


@dataclass
class Entry:
    number: int
    begin: int
    end: int
    record: int
    given: bool = False


RING_OPERATIONS = runs(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 70)),
        st.tuples(st.just("give_oldest"), st.just(0)),
        st.tuples(st.just("give"), st.integers(0, 99)),
    ),
)


@SETTINGS
@given(capacity=st.integers(1, 64), max_entries=st.integers(1, 8), operations=RING_OPERATIONS)
def test_ring_entries_never_overlap_and_leave_in_order(
    shim: ctypes.CDLL, capacity: int, max_entries: int, operations: list[tuple[str, int]]
) -> None:
    ring = shim.ring_new(capacity, max_entries)
    try:
        alive: list[Entry] = []
        for record, (operation, number) in enumerate(operations):
            if operation == "take":
                room = _room(alive, capacity, max_entries, number)
                entry = shim.ring_take(ring, number, record)
                assert (entry == NONE) == (room is None)
                if room is not None:
                    begin = shim.ring_address(ring, entry)
                    assert begin == room
                    assert all(begin >= other.end or begin + number <= other.begin for other in alive)
                    assert entry not in {other.number for other in alive}
                    alive.append(Entry(entry, begin, begin + number, record))
            elif alive:
                chosen = alive[0 if operation == "give_oldest" else number % len(alive)]
                if not chosen.given:
                    shim.ring_give(ring, chosen.number)
                    chosen.given = True
                while alive and alive[0].given:
                    alive.pop(0)
            assert shim.ring_oldest(ring) == (alive[0].number if alive else NONE)
            for other in alive:
                assert shim.ring_record_in(ring, other.number) == other.record
                assert shim.ring_address(ring, other.number) == other.begin
    finally:
        shim.ring_free(ring)


def _room(alive: list[Entry], capacity: int, max_entries: int, size: int) -> int | None:
    """Where `size` contiguous bytes are free behind the newest entry, going round once. None: nowhere."""
    if len(alive) == max_entries:
        return None
    if not alive:
        return 0 if size <= capacity else None
    head, tail = alive[-1].end, alive[0].begin
    behind = range(head, capacity) if alive[-1].begin >= tail else range(head, tail)
    if len(behind) >= size:
        return head
    return 0 if alive[-1].begin >= tail and tail >= size else None
