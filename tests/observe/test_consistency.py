"""SRP and SCH of traces are what trying everything, and keeping lists, finds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_shim import SETTINGS
from hypothesis import given
from hypothesis import strategies as st
from test_simulate import make_trace

from llama_flash.cli import main
from llama_flash.observe.consistency import (
    BALANCED,
    Routing,
    advise,
    consistency,
    hit_rate,
    routing_of,
    slots_of,
)
from llama_flash.observe.simulate import optimum, simulate
from llama_flash.observe.trace import Trace


def routing(*layers: list[list[int]], begins: tuple[int, ...] = (0,)) -> Routing:
    """layers: for each token, whether it uses each expert."""
    return Routing(tuple(np.array(layer, np.bool_) for layer in layers), begins, 4096.0)


def pattern(tokens: st.SearchStrategy[int], experts: int) -> st.SearchStrategy[list[list[int]]]:
    one = st.lists(st.integers(0, 1), min_size=experts, max_size=experts)
    return tokens.flatmap(lambda n: st.lists(one, min_size=n, max_size=n))


def best_f1(layers: list[Any], begins: tuple[int, ...], segment: int) -> float:
    """Of all segment routers there are; each pair of an expert and a segment is decided by itself."""
    actual = []
    for layer in layers:
        for begin, end in zip(begins, [*begins[1:], len(layer)], strict=True):
            for at in range(begin, end - segment + 1):
                actual += [layer[at : at + segment, e].tolist() for e in range(layer.shape[1])]
    best = 0.0
    for decided in product((0, 1), repeat=len(actual)):
        right = sum(sum(one) for one, yes in zip(actual, decided, strict=True) if yes)
        wrong = sum(segment - sum(one) for one, yes in zip(actual, decided, strict=True) if yes)
        missed = sum(sum(one) for one, yes in zip(actual, decided, strict=True) if not yes)
        if right:
            best = max(best, 2 * right / (2 * right + wrong + missed))
    return best


@SETTINGS
@given(used=pattern(st.integers(2, 5), 2), segment=st.integers(1, 3), split=st.booleans())
def test_srp_is_the_best_f1_of_all_segment_routers(used: list[list[int]], segment: int, split: bool) -> None:
    begins = (0, 2) if split and len(used) > 2 else (0,)
    here = routing(used, begins=begins)
    found = consistency(here, [], [segment])
    expected = best_f1(list(here.layers), begins, segment)
    if not found:
        assert len(used) < segment or all(end - begin < segment for begin, end in ((0, 2), (2, len(used))))
        return
    assert found[0].srp == pytest.approx(expected)


@SETTINGS
@given(used=pattern(st.just(4), 3), segment=st.integers(1, 2))
def test_srp_of_all_layers_shares_one_threshold_and_layers_have_their_own(used: list[list[int]], segment: int) -> None:
    first, second = [row[:1] for row in used], [row[1:] for row in used]
    (both,) = consistency(routing(first, second), [], [segment])
    (one,) = consistency(routing(first), [], [segment])
    (two,) = consistency(routing(second), [], [segment])
    assert both.layers == (min(one.srp, two.srp), max(one.srp, two.srp))
    (joined,) = consistency(routing(used), [], [segment])
    assert (joined.srp, joined.size_ratio) == (both.srp, both.size_ratio)


def test_a_router_that_never_changes_its_mind_is_mimicked_perfectly() -> None:
    (steady,) = consistency(routing([[1, 0, 1, 0]] * 40), [], [16])
    assert (steady.srp, steady.size_ratio, steady.layers) == (1.0, 1.0, (1.0, 1.0))
    turns = [[int(t % 4 == e) for e in range(4)] for t in range(40)]
    (turning,) = consistency(routing(turns), [0.25, 1.0], [4])
    # each expert once in each segment of four: all are chosen, or none
    assert turning.srp == pytest.approx(2 * 1 / (4 + 1)) and turning.size_ratio == pytest.approx(4.0)
    assert turning.sch[0] < 0.3 and turning.sch[1] == pytest.approx(36 / 40), "four first uses"


def naive_hit_rate(used: list[list[int]], slots: int, segment: int, skip: int) -> float:
    cache: list[int] = []  # the last used at the end
    hits = asked = 0
    for t, row in enumerate(used):
        now = [e for e, yes in enumerate(row) if yes]
        if t >= skip:
            hits += sum(e in cache for e in now)
            asked += len(now)
        cache = [e for e in cache if e not in now] + now
        while len(cache) > slots:

            def worth(e: int, t: int = t, now: list[int] = now) -> tuple[bool, int]:
                return e in now, sum(later[e] for later in used[t + 1 : t + 1 + segment])

            cache.remove(min(cache, key=worth))  # of equals the first, used longest ago
    return hits / asked if asked else 0.0


@SETTINGS
@given(used=pattern(st.integers(1, 25), 6), slots=st.integers(1, 6), segment=st.integers(1, 9), skip=st.integers(0, 5))
def test_sch_is_the_naive_cache(used: list[list[int]], slots: int, segment: int, skip: int) -> None:
    here = routing([row[:2] for row in used], [row[2:] for row in used])
    assert hit_rate(here, slots, segment, skip=skip) == pytest.approx(naive_hit_rate(used, slots, segment, skip))


@SETTINGS
@given(used=pattern(st.integers(1, 40), 8), segment=st.integers(1, 20))
def test_more_slots_never_hit_less(used: list[list[int]], segment: int) -> None:
    rates = [hit_rate(routing(used), slots, segment) for slots in range(1, 9)]
    assert rates == sorted(rates)


ASKED = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True), min_size=1, max_size=40)


@SETTINGS
@given(asked=ASKED, slots=st.integers(3, 8), segment=st.integers(1, 16))
def test_no_segment_beats_the_optimum(asked: list[list[int]], slots: int, segment: int) -> None:
    trace = make_trace([(3, sorted(records), 1) for records in asked])
    here = routing_of(trace)
    assert here is not None and here.n_experts == 8
    best = optimum(trace, {0: slots, 1: 1}).mean()
    assert hit_rate(here, slots, segment) <= best + 1e-12


def test_tokens_that_were_decoded_together_end_a_run() -> None:
    ops = [(3, [k % 3], 1) for k in range(6)] + [(3, [0, 1], 2)] + [(3, [2], 1)] * 4 + [(3, [0], 40)] + [(3, [1], 1)]
    here = routing_of(make_trace(ops))
    assert here is not None
    assert (here.n_tokens, here.begins) == (11, (0, 6, 10))
    assert [int(row.argmax()) for row in here.layers[0]] == [0, 1, 2, 0, 1, 2, 2, 2, 2, 2, 1]
    assert [one.segment for one in consistency(here, [], [4, 6, 7])] == [4, 6], "no run has seven"
    assert routing_of(make_trace([(3, [0], 40)])) is None


def test_a_layers_tensors_are_one_and_what_not_all_layers_saw_is_left_out() -> None:
    # three tensors of the first layer, one of the second, which sees a token that the first did not
    ops = [(tensor, [k % 5], 1) for k in range(9) for tensor in (0, 1, 2, 3)] + [(3, [7], 1)]
    here = routing_of(make_trace(ops))
    assert here is not None and [layer.shape for layer in here.layers] == [(9, 8), (9, 8)]
    assert here.expert_bytes == 4096 * 2, "three slots in one layer, one in the other"
    assert here.used_by_token == 2


def test_the_advice_is_twice_what_a_token_uses_or_what_segments_need() -> None:
    steady = routing([[1, 0, 0, 1, 0, 0, 0, 0]] * 40)
    advice = advise(steady, consistency(steady, [0.5]), skip=4)
    assert advice is not None
    assert (advice.ratio, advice.experts, advice.share, advice.bytes) == (BALANCED, 4, 0.5, 4 * 4096)
    assert advice.sch == 1.0 and advice.times is None, "a slot beyond it saves nothing"
    turns = routing([[int(t % 8 == e) for e in range(8)] for t in range(64)])
    wide = advise(turns, consistency(turns, [0.5]))
    assert wide is not None and wide.experts == 8 and wide.times is None
    assert advise(steady, []) is None
    assert slots_of(steady, 0.01) == 1


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    ops = [(layer, rng.choice(8, 2, replace=False).tolist(), 1) for _ in range(90) for layer in (0, 1, 2, 3)]
    path = tmp_path / "some.npz"
    make_trace(ops).save(path)
    return path


Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """What `llama-flash simulate` prints of a trace."""

    def run(path: Path, *options: str) -> str:
        command = ["llama-flash", "simulate", str(path), "--cache", "36%,50%", "--policy", "lru", *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return capsys.readouterr().out

    return run


def test_simulate_prints_both_metrics_and_the_cache_that_they_advise(said: Said, trace_file: Path) -> None:
    text = said(trace_file)
    for words in ("SRP", "SCH", "advised cache: ", "of the 16 experts"):
        assert words in text, text
    report = json.loads(said(trace_file, "--json"))
    assert [row["segment"] for row in report["consistency"]] == [4, 16, 64]
    assert all(len(row["sch"]) == 2 and 0 < row["srp"] <= 1 for row in report["consistency"])
    assert 8 <= report["advice"]["experts"] <= 16, "of four that a token uses"
    assert report["advice"]["share"] == report["advice"]["experts"] / 16
    assert len(report["results"]) == 2


def test_tokens_decoded_in_pairs_have_no_routing_to_speak_of(said: Said, tmp_path: Path) -> None:
    path = tmp_path / "few.npz"
    make_trace([(3, [k % 8, (k + 1) % 8], 2) for k in range(12)]).save(path)
    report = json.loads(said(path, "--json"))
    assert (report["consistency"], report["advice"]) == ([], None)
    assert "advised" not in said(path)


def test_what_knows_the_next_tokens_lies_between_lru_and_the_optimum(trace_file: Path) -> None:
    trace = Trace.load(trace_file)
    lru, best = simulate(trace, 0.5, ["lru", "optimum"])
    here = routing_of(trace)
    assert here is not None
    rate = hit_rate(here, slots_of(here, 0.5), 4, skip=here.n_tokens - best.tokens)
    assert lru.hit_rate < rate <= best.hit_rate + 0.02, "of the same tokens"
