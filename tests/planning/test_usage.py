"""What a run teaches the next plan: worked out by hand, kept and ignored as files are, and seen to come true."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ModelFile
from engines import tokens
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import Llama
from test_cost import RATE, device, model, needs, placed

import llama_flash
from llama_flash import FlashOffload
from llama_flash.budget.rooms import Breakdown
from llama_flash.observe.history import Call
from llama_flash.observe.stats import Counters
from llama_flash.planning import usage
from llama_flash.planning.cost import expect
from llama_flash.planning.misses import expert_misses, expert_slots, neuron_misses, shared_of, skew_of
from llama_flash.planning.usage import LEAST_TOKENS, Usage, later_half, observe

MIB = 1 << 20
SEEN = Usage(tokens=100, computing=0.02, skew=4.0, read=1e7, waited=0.009)


@pytest.fixture(autouse=True)
def _kept_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_FLASH_WARM_START", "1")
    monkeypatch.setenv("LLAMA_FLASH_CACHE", str(tmp_path / "cache"))


def calls(n: int, *, seconds: float = 0.01, n_tokens: int = 1, start: float = 100.0, **counters: Any) -> list[Call]:
    """n calls, one after the other."""
    return [
        Call(start + i * seconds, start + (i + 1) * seconds, Counters(tokens=n_tokens, calls=1, **counters))
        for i in range(n)
    ]


# what is learnt


@given(st.floats(0.01, 0.99), st.floats(0.0, 15.0))
def test_the_skew_of_what_was_missed_is_found_again(held: float, skew: float) -> None:
    found = skew_of(held, expert_misses(held, skew))
    assert found == pytest.approx(skew, abs=1e-6)


@given(st.floats(0.001, 0.5), st.floats(0.01, 0.9), st.floats(0.2, 50.0))
def test_what_tokens_share_is_found_again(active: float, held: float, shared: float) -> None:
    missed = neuron_misses(active, held, shared=shared)
    found = shared_of(active, held, missed)
    assert found is not None and found == pytest.approx(shared, rel=1e-6)


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 20.0))
def test_more_slots_never_miss_more_whatever_the_skew(held: float, more: float, skew: float) -> None:
    assert expert_misses(max(held, more), skew) <= expert_misses(min(held, more), skew)


def test_what_cannot_be_told_is_not() -> None:
    assert skew_of(1.0, 0.1) is None and skew_of(0.5, 0.0) is None
    assert skew_of(0.5, 0.9) == 0.0, "more than even routing would miss"
    assert shared_of(0.1, 0.5, 0.6) is None and shared_of(0.0, 0.5, 0.1) is None and shared_of(0.1, 0.5, 0.0) is None


def test_the_later_half_counts_and_pauses_do_not() -> None:
    cold = calls(40, seconds=0.05, bytes_read=1000)
    warm = calls(60, seconds=0.01, start=cold[-1].ended, bytes_read=10)
    pause = calls(1, seconds=0.01, start=warm[-1].ended + 30, bytes_read=10)
    rest = calls(9, seconds=0.01, start=pause[-1].ended, bytes_read=10)
    found = later_half(cold + warm + pause + rest)
    assert found is not None
    counters, seconds = found
    assert counters.tokens == 54, "one of the later 55 came after somebody was waited for"
    assert counters.bytes_per_token == 10 and seconds == pytest.approx(0.54)


def test_few_tokens_and_prompts_teach_nothing() -> None:
    assert later_half(calls(2 * LEAST_TOKENS - 1)) is None
    assert later_half(calls(4 * LEAST_TOKENS, n_tokens=5)) is None
    assert later_half([]) is None


def test_an_even_run_and_a_skewed_one_are_told_apart() -> None:
    plan = placed(model(), "experts")
    wanted = needs(plan, 96)
    memory = Breakdown(slots=expert_slots(wanted) // 2)
    for hits, skew in ((5, 0.0), (9, -math.log(0.2) / 0.5)):
        run = calls(100, hits=hits, misses=10 - hits, bytes_read=2000, wait_seconds=0.004)
        seen = observe(run, plan, memory, wanted, "none")
        assert seen is not None and seen.skew == pytest.approx(skew, rel=1e-5, abs=1e-5)
        assert seen.computing == pytest.approx(0.006) and seen.waited == pytest.approx(0.004) and seen.read == 2000


def test_waiting_for_panels_is_not_waiting_for_experts() -> None:
    plan = placed(model(), "experts")
    run = calls(100, hits=5, misses=5, panel_reads=3, bytes_read=2000, wait_seconds=0.004)
    seen = observe(run, plan, Breakdown(slots=96 * MIB), needs(plan, 96), "none")
    assert seen is not None and seen.read == seen.waited == 0.0 and seen.computing == pytest.approx(0.006)


# what it is good for


def test_a_plan_expects_what_was_seen() -> None:
    meta = model()  # 4 layers, 8 experts of 2 MiB in 3 weights, 2 used
    plan = placed(meta, "experts")
    slots = int(0.5 * 96 * (2 * MIB + 4096))

    def cost(seen: Usage | None) -> Any:
        return expect(meta, plan, Breakdown(slots=slots), needs(plan, 96), device(), usage=seen)

    even, skewed = cost(None), cost(SEEN)
    assert skewed.bytes_per_token == pytest.approx(even.bytes_per_token * math.exp(-2))
    assert skewed.compute_seconds == 0.02
    hidden = SEEN.read / RATE - SEEN.waited
    assert skewed.waited_seconds == pytest.approx(skewed.io_seconds - hidden)
    assert skewed.tokens_per_second == pytest.approx(1 / (0.02 + skewed.waited_seconds))
    assert not any("evenly" in text for text in skewed.assumptions)
    assert any("of 100 tokens" in text for text in skewed.assumptions)


def test_what_was_seen_with_another_predictor_says_nothing() -> None:
    meta = model()
    plan = placed(meta, "experts")
    seen = Usage(tokens=100, computing=10.0, skew=4.0, predictor="exact")
    memory, wanted = Breakdown(slots=96 * MIB), needs(plan, 96)
    assert expect(meta, plan, memory, wanted, device(), usage=seen) == expect(meta, plan, memory, wanted, device())


def test_what_is_read_while_it_is_computed_costs_nothing() -> None:
    meta = model()
    plan = placed(meta, "experts")
    seen = Usage(tokens=100, computing=10.0, skew=0.0, read=1e12, waited=0.0)
    cost = expect(meta, plan, Breakdown(slots=96 * MIB), needs(plan, 96), device(), usage=seen)
    assert cost.waited_seconds == 0.0 and cost.tokens_per_second == pytest.approx(0.1)


# how it is kept


def test_it_is_kept_and_found(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    assert usage.load([path]) is None
    usage.save([path], SEEN)
    assert usage.load([path]) == SEEN
    usage.save([path], Usage(tokens=50, computing=0.01, shared=2.0, active=0.1, predictor="exact"))
    both = usage.load([path])
    assert both is not None and (both.skew, both.shared, both.tokens) == (4.0, 2.0, 50), "seen before, seen now"
    (kept,) = (tmp_path / "cache" / "usage").iterdir()
    os.utime(path, ns=(1, 1))
    assert usage.load([path]) is None, "another version of the model"
    assert kept.name.startswith("m-")


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", "null", '{"version": 1}', "nan", "wrong", "missing", "name", "unknown"]
)
def test_a_damaged_file_is_as_good_as_none(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    usage.save([path], SEEN)
    (kept,) = (tmp_path / "cache" / "usage").iterdir()
    content = json.loads(kept.read_text())
    if damage == "nan":
        content["usage"]["skew"] = math.nan
    elif damage == "wrong":
        content["usage"]["computing"] = "fast"
    elif damage == "missing":
        content["usage"]["computing"] = None
    elif damage == "name":
        content["usage"]["predictor"] = 1
    elif damage == "unknown":
        content["usage"]["luck"] = 1
    kept.write_text(json.dumps(content) if damage.isalpha() and damage != "null" else damage)
    assert usage.load([path]) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    monkeypatch.setenv("LLAMA_FLASH_CACHE", "/proc/nothing")
    usage.save([path], SEEN)
    assert usage.load([path]) is None


# with a model


def run(path: Path, n: int, **options: Any) -> Any:
    flash = FlashOffload(what="experts", **options)
    llm = Llama(str(path), n_ctx=256, n_threads=2, verbose=False, flash_offload=flash)
    needed = llm.flash.native.requirements()
    llm.flash.native.set_memory(int(needed.min_memory + 0.5 * needed.expert_bytes))
    llm.flash.share.note_memory()
    llm.eval(tokens(8, seed=1))
    for token in tokens(n, seed=2):
        llm.eval([token])
    memory = llm.flash.memory
    llm.close()
    return memory


def test_a_run_teaches_the_next_plan(model_file: ModelFile) -> None:
    path = model_file("qwen3moe", "Q4_0")
    files = [path]
    run(path, 2 * LEAST_TOKENS - 4)
    assert usage.load(files) is None, "too few tokens"
    run(path, 100, warm_start=False)
    assert usage.load(files) is None, "not wanted"
    run(path, 100)
    seen = usage.load(files)
    assert seen is not None and seen.skew is not None and seen.computing > 0 and seen.read > 0
    text = llama_flash.plan(path, n_ctx=256, flash_offload={"what": "experts"}).cost.assumptions
    assert any("as in the last run" in one for one in text)
    text = llama_flash.plan(path, n_ctx=256, flash_offload={"what": "experts", "warm_start": False}).cost.assumptions
    assert not any("as in the last run" in one for one in text)


def test_memory_that_moved_begins_a_new_count(model_file: ModelFile) -> None:
    path = model_file("qwen3moe", "Q4_0", seed=1)
    llm = Llama(str(path), n_ctx=256, n_threads=2, verbose=False, flash_offload=FlashOffload(what="experts"))
    for token in tokens(100, seed=2):
        llm.eval([token])
    needed = llm.flash.native.requirements()
    llm.flash.native.set_memory(int(needed.min_memory + 0.5 * needed.expert_bytes))
    llm.flash.share.note_memory()
    llm.close()
    assert usage.load([path]) is None


def test_needs_of_another_kind_are_not_asked_for() -> None:
    plan = placed(model(), "ffn")
    seen = observe(calls(100, bytes_read=5, panel_reads=1), plan, Breakdown(), SimpleNamespace(), "none")
    assert seen is not None and seen.skew is None and seen.shared is None
