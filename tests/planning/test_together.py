"""What several sequences at the same time cost, against sums worked out by hand, and what a plan says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_heads import DENSE, MIB, model
from test_cost import DRAM, SECTORS, bundles, device, needs, placed

import llama_flash
from llama_flash import FlashBudgetError, FlashOffload
from llama_flash.budget.rooms import Breakdown
from llama_flash.observe.history import Call
from llama_flash.observe.stats import Counters
from llama_flash.planning.cost import expect
from llama_flash.planning.misses import expert_misses, experts_together, neuron_misses, neurons_together
from llama_flash.planning.together import Together, advised, counts
from llama_flash.planning.usage import LEAST_TOKENS, later_half, observe

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))


def test_a_dense_weight_is_read_once_for_all() -> None:
    meta = model(**DENSE)
    plan = placed(meta, "ffn")
    arguments = (meta, plan, Breakdown(pinned=32 * MIB, stream=8 * MIB), needs(plan, n_panels=64), device(1e8))
    one, four = expect(*arguments), expect(*arguments, tokens=4)
    assert four.io_seconds == one.io_seconds and four.traffic == one.traffic
    assert four.bytes_per_token == one.bytes_per_token / 4
    assert one.bound_by == "flash" and four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)


def test_experts_that_several_tokens_use_are_read_once() -> None:
    meta = model()  # 4 layers, 8 experts of 2 MiB in 3 weights, 2 used
    plan = placed(meta, "experts")
    slots = int(0.25 * 96 * (2 * MIB + 4096))
    for n in (1, 2, 4):
        cost = expect(meta, plan, Breakdown(slots=slots), needs(plan, 96), device(), tokens=n)
        distinct = 96 * (1 - (1 - 2 / 8) ** n)  # of experts that are used evenly
        assert cost.bytes_per_token * n == pytest.approx(distinct * 0.75 * (2 * MIB + SECTORS))
        assert cost.traffic[0].hit_rate == pytest.approx(0.25)
        assert cost.touched == pytest.approx(meta.file_bytes - 32 * MIB - 192 * MIB * (1 - 2 / 8) ** n)
    assert cost.tokens == 4 and any("4 tokens of different texts" in text for text in cost.assumptions)


@given(st.integers(1, 16), st.floats(0.01, 0.5), st.floats(0.0, 0.95), st.floats(0.0, 8.0))
def test_together_is_never_less_than_one_needs_nor_more_than_each_alone(
    n: int, used: float, held: float, skew: float
) -> None:
    for times in (experts_together(n, used, held, skew), neurons_together(n, used, held)):
        assert 1 - 1e-9 <= times <= n + 1e-9
    assert experts_together(n, used, held, skew) <= experts_together(n + 1, used, held, skew) + 1e-9


@pytest.mark.parametrize("skew", [0.0, 4.5])
def test_what_is_missed_together_is_what_drawing_experts_by_that_skew_shows(skew: float) -> None:
    n_experts, n_used, n = 128, 4, 8
    ranks = (np.arange(n_experts) + 0.5) / n_experts
    weights = np.exp(-skew * ranks) * (1 + skew * (1 - ranks))
    chances = weights / weights.sum() * n_used
    held = 0.25
    rng = np.random.default_rng(0)
    drawn = rng.random((4000, n, n_experts)) < chances
    missed = drawn[:, :, int(held * n_experts) :]
    alone, together = missed.sum(axis=(1, 2)).mean() / n, missed.any(axis=1).sum(axis=1).mean()
    assert alone / n_used == pytest.approx(expert_misses(held, skew), rel=0.03)
    assert together / alone == pytest.approx(experts_together(n, n_used / n_experts, held, skew), rel=0.03)


def test_neurons_that_several_tokens_use_are_read_once() -> None:
    meta, plan, _ = bundles()
    record = 1500
    numbers: Any = type("Needs", (), {"neuron_record": record, "neuron_resident": 0, "n_panels": 0, "n_experts": 0})()
    memory = Breakdown(slots=2000 * record, stream=4 * MIB)
    cost = {
        n: expect(meta, plan, memory, numbers, device(), predictor="lowrank", io_depth=128, tokens=n) for n in (1, 8)
    }
    times = neurons_together(8, 0.10, 0.1)
    wanted = 20000 * 0.10 * neuron_misses(0.10, 0.1)
    assert 1 < times < 8
    share = wanted * times / 20000
    assert 8 * cost[8].reads_per_token == pytest.approx(wanted * times * (1 - share) ** 2)
    assert cost[8].bytes_per_token < cost[1].bytes_per_token
    whole = expect(meta, plan, memory, numbers, device(), predictor="off", tokens=8)
    assert 8 * whole.bytes_per_token == expect(meta, plan, memory, numbers, device(), predictor="off").bytes_per_token


def test_computing_goes_on_for_longer_with_more_tokens() -> None:
    meta = model(**DENSE)
    plan = placed(meta, "ffn")
    arguments = (meta, plan, Breakdown(pinned=64 * MIB, stream=MIB), needs(plan, n_panels=64), device(1e12))
    one, four = expect(*arguments), expect(*arguments, tokens=4)
    assert one.compute_seconds == pytest.approx(one.touched / DRAM)
    assert four.compute_seconds == pytest.approx(one.compute_seconds * (1 + 3 * 0.25))
    assert any("25% of the first one's time" in text for text in four.assumptions)


def test_tokens_compute_longer_where_each_has_weights_of_its_own() -> None:
    meta = model()
    plan = placed(meta, "experts")
    arguments = (meta, plan, Breakdown(slots=96 * MIB), needs(plan, 96), device(1e12))
    one, four = expect(*arguments), expect(*arguments, tokens=4)
    further = (four.compute_seconds / one.compute_seconds - 1) / 3
    assert 0.25 < further < 0.6


def test_the_advice_is_the_last_doubling_that_brings_a_tenth() -> None:
    cost = expect(model(), placed(model(), "experts"), Breakdown(), needs(placed(model(), "experts"), 96), device())

    def rates(*each: float) -> list[Together]:
        return [
            Together(1 << i, replace(cost, traffic=(), compute_seconds=(1 << i) / rate, tokens=1 << i))
            for i, rate in enumerate(each)
        ]

    assert advised(rates(10, 19, 30, 32, 60)) == 4
    assert advised(rates(10, 10.5)) == 1
    assert advised(rates(10, 20, 40)) == 4
    assert rates(10, 19)[1].tokens_per_second_each == pytest.approx(9.5)
    assert counts(6) == [1, 2, 4, 6, 8, 16]


def test_a_plan_counts_every_sequence_and_says_what_they_get() -> None:
    options = FlashOffload(what="experts", follow=False)  # nothing is lent: some experts have no room
    one = llama_flash.plan(SHIPPED, n_ctx=1024, flash_offload=options)
    four = llama_flash.plan(SHIPPED, n_ctx=1000, parallel=4, flash_offload=options)
    assert (one.parallel, four.parallel) == (1, 4)
    assert four.memory.kv == 4 * one.memory.kv > 0
    assert four.memory.outputs == 4 * one.memory.outputs
    assert four.smallest >= one.smallest + 2 * one.memory.kv
    assert [option.sequences for option in four.together][:3] == [1, 2, 4]
    tight = llama_flash.plan(SHIPPED, four.smallest + 8 * MIB, n_ctx=1000, parallel=4, flash_offload=options)
    rates = [option.tokens_per_second for option in tight.together]
    assert rates[:3] == sorted(rates[:3]) and tight.advised_parallel >= 2
    read = [option.bytes_per_token for option in tight.together]
    assert read[0] > read[2] > 0, "what several need is read once"
    said = json.loads(json.dumps(four.as_dict()))
    assert said["parallel"] == 4 and said["advised_parallel"] == four.advised_parallel
    assert said["together"][2]["tokens_per_second"] == pytest.approx(4 * said["together"][2]["tokens_per_second_each"])
    with pytest.raises(ValueError, match="parallel: 0 is not a whole number from 1 on"):
        llama_flash.plan(SHIPPED, parallel=0)


def test_contexts_that_have_no_room_are_not_offered() -> None:
    options = FlashOffload(what="experts")
    smallest = llama_flash.plan(SHIPPED, n_ctx=8192, flash_offload=options).smallest
    tight = llama_flash.plan(SHIPPED, smallest + 4 * MIB, n_ctx=8192, flash_offload=options)
    assert [option.sequences for option in tight.together] == [1] and tight.advised_parallel == 1
    with pytest.raises(FlashBudgetError) as refused:
        llama_flash.plan(SHIPPED, smallest, n_ctx=8192, parallel=4, flash_offload=options)
    assert refused.value.smallest >= smallest + 2 * tight.memory.kv


def test_the_command_shows_rates_for_all_and_for_each() -> None:
    command = [sys.executable, "-m", "llama_flash", "plan", str(SHIPPED), "--parallel", "6", "--what", "experts"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "clients at the same time, expected" in done.stdout and "more clients bring" in done.stdout
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert found["parallel"] == 6 and 6 in [option["sequences"] for option in found["together"]]


def test_passes_of_several_sequences_do_not_teach_what_one_token_costs() -> None:
    def calls(n: int, sequences: int, begin: float) -> list[Call]:
        return [
            Call(begin + i, begin + i + 1, Counters(tokens=sequences, calls=1, hits=3, misses=1), sequences)
            for i in range(n)
        ]

    plan = placed(model(), "experts")
    many = calls(4 * LEAST_TOKENS, 4, 0.0)
    assert later_half(many) is not None
    assert observe(many, plan, Breakdown(slots=MIB), needs(plan, 96), "none") is None
    both = [*calls(2 * LEAST_TOKENS, 4, 0.0), *calls(2 * LEAST_TOKENS, 1, 1000.0)]
    seen = observe(both, plan, Breakdown(slots=MIB), needs(plan, 96), "none")
    assert seen is not None and seen.computing == pytest.approx(1.0)
