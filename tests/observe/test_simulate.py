"""Replayed policies: none beats the optimum, which is one; LRU is LRU; the plugin's is the plugin's slot_cache."""

from __future__ import annotations

import ctypes
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from cache_shim import NONE, SETTINGS, compiled
from hypothesis import example, given
from hypothesis import strategies as st

from llama_flash.observe.simulate import (
    EXPERTS_HALF_LIFE,
    POLICIES,
    _AgeingCache,
    accesses,
    next_use,
    optimum,
    simulate,
    slots_for,
)
from llama_flash.observe.trace import Trace, TracedTensor

N_RECORDS = 8


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("shim"))


def make_trace(ops: list[tuple[int, list[int], int]], *, neurons: bool = False, n_records: int = N_RECORDS) -> Trace:
    """ops: (tensor, records, tokens). Tensors 0 to 2 are a layer's, 3 is another layer's, 4 one's of another class."""
    tensors = tuple(
        TracedTensor(f"blk.{group}.{i}", n_records, group, size_class, neurons, 4096)
        for i, (group, size_class) in enumerate([(0, 0), (0, 0), (0, 0), (1, 0), (2, 1)])
    )
    clock = dict.fromkeys(range(len(tensors)), 0)
    session, tokens = 0, []
    for tensor, _, n in ops:  # as ops/experts.cpp counts
        clock[tensor] = session = max(clock[tensor] + n, session)
        tokens.append(session)
    sizes = [len(records) for _, records, _ in ops]
    return Trace(
        model="none",
        tensors=tensors,
        token=np.array(tokens, np.int64),
        n_tokens=np.array([n for _, _, n in ops], np.int64),
        tensor=np.array([tensor for tensor, _, _ in ops], np.int64),
        begin=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        record=np.array([r for _, records, _ in ops for r in records], np.int64),
        uses=np.array([1 for _, records, _ in ops for _ in records], np.int64),
    )


def an_op(n_records: int = N_RECORDS, n_tokens: tuple[int, ...] = (1,)) -> st.SearchStrategy[Any]:
    records = st.lists(st.integers(0, n_records - 1), min_size=1, max_size=3, unique=True)
    return st.tuples(st.integers(0, 4), records, st.sampled_from(n_tokens))


OPS = st.integers(1, 60).flatmap(lambda n: st.lists(an_op(), min_size=n, max_size=n))
WITH_PROMPTS = st.integers(1, 60).flatmap(
    lambda n: st.lists(an_op(n_tokens=(1, 1, 1, 2, 16, 17, 40)), min_size=n, max_size=n)
)


@SETTINGS
@given(ops=WITH_PROMPTS, slots=st.integers(1, 12), neurons=st.booleans())
def test_no_policy_beats_the_optimum(ops: list[Any], slots: int, neurons: bool) -> None:
    trace = make_trace(ops, neurons=neurons)
    best = optimum(trace, {0: slots, 1: 3})
    for name, policy in POLICIES.items():
        assert policy(trace, {0: slots, 1: 3}).sum() <= best.sum(), name


@SETTINGS
@given(ops=st.lists(an_op(5), min_size=1, max_size=9), slots=st.integers(1, 4))
def test_the_optimum_is_what_trying_everything_finds(ops: list[Any], slots: int) -> None:
    trace = make_trace([(3, records, 1) for _, records, _ in ops])
    states: dict[frozenset[int], int] = {frozenset(): 0}  # what is in slots, and the least misses until then
    for _, records, _ in ops:
        after: dict[frozenset[int], int] = {}
        for state, misses in states.items():
            here = state | set(records)
            cost = misses + len(here) - len(state)
            for kept in combinations(sorted(here), min(slots, len(here))):
                after[frozenset(kept)] = min(cost, after.get(frozenset(kept), cost))
        states = after
    assert (~optimum(trace, {0: slots, 1: 1})).sum() == min(states.values())


@SETTINGS
@given(ops=OPS, slots=st.integers(1, 12))
def test_lru_is_the_naive_one(ops: list[Any], slots: int) -> None:
    trace = make_trace(ops)
    lists: dict[int, list[int]] = {0: [], 1: []}
    expected = []
    records, classes, _ = accesses(trace)
    for record, size_class in zip(records.tolist(), classes.tolist(), strict=True):
        cache = lists[size_class]
        expected.append(record in cache)
        if record in cache:
            cache.remove(record)
        cache.append(record)
        del cache[: -(slots if size_class == 0 else 2)]
    assert POLICIES["lru"](trace, {0: slots, 1: 2}).tolist() == expected


@SETTINGS
@given(record=st.lists(st.integers(0, 4), max_size=30))
def test_next_uses_are_where_the_record_comes_again(record: list[int]) -> None:
    found = next_use(np.array(record, np.int64)).tolist()
    for i, used in enumerate(record):
        later = [k for k in range(i + 1, len(record)) if record[k] == used]
        assert found[i] == later[0] if later else found[i] >= len(record)
    assert len(set(found)) == len(found)


CACHE_OPS = st.integers(1, 80).flatmap(
    lambda n: st.lists(
        st.tuples(
            st.lists(st.integers(0, 15), min_size=1, max_size=3, unique=True),  # records of one op
            st.sampled_from([1, 1, 1, 1, 2, 40, 900]),  # tokens until it
            st.lists(st.booleans(), min_size=3, max_size=3),  # which of their reads come late
        ),
        min_size=n,
        max_size=n,
    )
)


@SETTINGS
@given(ops=CACHE_OPS, slots=st.integers(3, 9))
@example(ops=[([k % 16], 1, [False] * 3) for k in range(80)], slots=3)
def test_the_replayed_cache_is_the_plugins_whenever_reads_arrive(
    shim: ctypes.CDLL,
    ops: list[tuple[list[int], int, list[bool]]],
    slots: int,
) -> None:
    """Each op's records are fetched by one before it, as a layer's other tensors' are, and then asked for."""
    cache = shim.cache_new((ctypes.c_uint32 * 1)(slots), 1, 16)
    model = _AgeingCache({0: slots}, [0] * 16, EXPERTS_HALF_LIFE)
    where: dict[int, int] = {}
    evicted = ctypes.c_int32()
    now = 0
    try:
        for records, passed, late in ops:
            now += passed
            for record in records:  # those that are there stay
                if record in where:
                    shim.cache_hold(cache, where[record])
                    model.hold(record)
            reading = []
            for record, is_late in zip(records, late, strict=False):
                if record in where:
                    continue
                slot = shim.cache_take(cache, 0, record, True, ctypes.byref(evicted))
                before = [r for r in range(16) if model.cached[r]]
                assert model.take(record, True) == (slot != NONE)
                gone = [r for r in before if not model.cached[r]]
                assert gone == ([] if evicted.value == NONE else [evicted.value])
                for lost in gone:
                    del where[lost]
                where[record] = slot
                if is_late:
                    shim.cache_set_reading(cache, slot, True)
                    reading.append(slot)
            shim.cache_end_op(cache)
            model.end_op()
            for record in records:
                shim.cache_use(cache, record, now, 1, 1)
                model.use(record, now, 1, 1)
                shim.cache_hold(cache, where[record])
                model.hold(record)
            for slot in reading:
                shim.cache_set_reading(cache, slot, False)
            shim.cache_end_op(cache)
            model.end_op()
            for record in range(16):
                assert shim.cache_score(cache, record) == model.score[record]
    finally:
        shim.cache_free(cache)


def test_counts_and_shares() -> None:
    trace = make_trace([(0, [k % 8], 1) for k in range(30)])
    (lru, best) = simulate(trace, 0.5, ["lru", "optimum"], skip=0.5)
    assert (lru.tokens, lru.hits + lru.misses, best.misses) == (15, 15, best.optimum)
    assert lru.slots == sum(slots_for(trace, 0.5).values()) == 16 + 4
    assert lru.hits == 15 and lru.of_optimum is None, "eight records fit"
    (small,) = simulate(trace, 0.2, ["lru"], skip=0.5)  # six slots of the class, eight records in turn
    assert (small.hits, small.misses_per_token) == (0, 1.0)
    assert small.of_optimum is not None and small.of_optimum > 2
    with pytest.raises(ValueError, match="no such policy: 'mru'; there are lru, window"):
        simulate(trace, 0.5, ["mru"])
    with pytest.raises(ValueError, match="no decoded token"):
        simulate(make_trace([(0, [1], 40)]), 0.5, ["lru"])


def test_a_long_trace_takes_seconds() -> None:
    """The size that the tool is for; the time itself is not measured, a test that hangs is seen."""
    rng = np.random.default_rng(0)
    popular = rng.permuted(np.tile(np.arange(128), (36, 1)), axis=1)
    ops = []
    for _ in range(100):
        for layer in range(4):
            ops.append((layer, popular[layer][np.unique(rng.zipf(1.3, 12) % 128)].tolist(), 1))
    trace = make_trace(ops, n_records=128)
    rates = {result.policy: result.hit_rate for result in simulate(trace, 0.3, list(POLICIES))}
    assert rates["optimum"] > rates["lfu"] > rates["lru"] > rates["window"] > 0.1
