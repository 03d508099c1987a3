"""slot_cache and ring against models in Python: hypothesis looks for operations after which they differ."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plugin_parts import compile_cpp, sources

NONE = -1
SETTINGS = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,  # a change is judged by what it changes, not by the day's luck
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = Path(__file__).with_name("cache_shim.cpp")
    path = tmp_path_factory.mktemp("shim") / "cache_shim.so"
    library = ctypes.CDLL(str(compile_cpp(path, "-shared", "-fPIC", source, *sources("cache", "ring"))))
    i32, u32, u64, size = ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t
    handle, boolean = ctypes.c_void_p, ctypes.c_bool
    for name, result, *arguments in (
        ("cache_new", handle, ctypes.POINTER(u32), u32),
        ("cache_free", None, handle),
        ("cache_take", i32, handle, u32, u32, u64, boolean, ctypes.POINTER(i32)),
        ("cache_touch", None, handle, i32, u64),
        ("cache_set_reading", None, handle, i32, boolean),
        ("cache_drop", None, handle, i32),
        ("cache_record_in", u32, handle, i32),
        ("cache_used", u32, handle),
        ("ring_new", handle, size, u32),
        ("ring_free", None, handle),
        ("ring_take", i32, handle, size, u32),
        ("ring_give", None, handle, i32),
        ("ring_address", size, handle, i32),
        ("ring_record_in", u32, handle, i32),
        ("ring_oldest", i32, handle),
    ):
        function = getattr(library, str(name))
        function.restype, function.argtypes = result, arguments
    return library


@dataclass
class Slot:
    record: int
    stamp: int
    reading: bool = False


class CacheModel:
    """By class: the empty slots, and the others by slot number, least recently used first."""

    def __init__(self, slots_per_class: list[int]) -> None:
        self.empty: list[set[int]] = []
        self.held: list[OrderedDict[int, Slot]] = []
        first = 0
        for n in slots_per_class:
            self.empty.append(set(range(first, first + n)))
            self.held.append(OrderedDict())
            first += n

    def slots(self) -> list[tuple[int, int]]:
        return [(size_class, slot) for size_class, held in enumerate(self.held) for slot in held]

    def victim(self, size_class: int, stamp: int, evict: bool) -> int:
        """The slot that must go, NONE if none may."""
        held = self.held[size_class]
        if not evict or not held:
            return NONE
        slot, oldest = next(iter(held.items()))
        return NONE if oldest.reading or oldest.stamp == stamp else slot


# the numbers choose among what there is when the operation is carried out
CACHE_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 99), st.booleans()),
        st.tuples(st.just("touch"), st.integers(0, 99), st.just(True)),
        st.tuples(st.just("reading"), st.integers(0, 99), st.booleans()),
        st.tuples(st.just("drop"), st.integers(0, 99), st.just(True)),
        st.tuples(st.just("next_op"), st.just(0), st.just(True)),
    ),
    max_size=120,
)


@SETTINGS
@given(slots_per_class=st.lists(st.integers(0, 5), min_size=1, max_size=3), operations=CACHE_OPERATIONS)
def test_slots_go_to_the_least_recently_used_and_never_while_locked(
    shim: ctypes.CDLL, slots_per_class: list[int], operations: list[tuple[str, int, bool]]
) -> None:
    cache = shim.cache_new((ctypes.c_uint32 * len(slots_per_class))(*slots_per_class), len(slots_per_class))
    try:
        model, stamp = CacheModel(slots_per_class), 1
        for record, (operation, number, flag) in enumerate(operations):
            if operation == "next_op":
                stamp += 1
            elif operation == "take":
                _take(shim, cache, model, number % len(slots_per_class), record, stamp, flag)
            elif slots := model.slots():
                size_class, slot = slots[number % len(slots)]
                held = model.held[size_class]
                if operation == "touch":
                    shim.cache_touch(cache, slot, stamp)
                    held[slot].stamp = stamp
                    held.move_to_end(slot)
                elif operation == "reading":
                    shim.cache_set_reading(cache, slot, flag)
                    held[slot].reading = flag
                else:
                    shim.cache_drop(cache, slot)
                    del held[slot]
                    model.empty[size_class].add(slot)
            assert shim.cache_used(cache) == len(model.slots())
            for size_class, slot in model.slots():
                assert shim.cache_record_in(cache, slot) == model.held[size_class][slot].record
    finally:
        shim.cache_free(cache)


def _take(
    shim: ctypes.CDLL, cache: Any, model: CacheModel, size_class: int, record: int, stamp: int, evict: bool
) -> None:
    evicted = ctypes.c_int32(-2)
    slot = shim.cache_take(cache, size_class, record, stamp, evict, ctypes.byref(evicted))
    held, empty = model.held[size_class], model.empty[size_class]
    if empty:
        assert slot in empty, "an empty slot comes before any other"
        assert evicted.value == NONE
        empty.remove(slot)
    else:
        assert slot == model.victim(size_class, stamp, evict)
        if slot == NONE:
            assert evicted.value == NONE
            return
        assert evicted.value == held.pop(slot).record
    held[slot] = Slot(record, stamp)


@dataclass
class Entry:
    number: int
    begin: int
    end: int
    record: int
    given: bool = False


RING_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 70)),
        st.tuples(st.just("give_oldest"), st.just(0)),
        st.tuples(st.just("give"), st.integers(0, 99)),
    ),
    max_size=150,
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
