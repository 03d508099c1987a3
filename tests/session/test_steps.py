"""Sequences of unlike lengths are filled up where that saves more steps than it costs tokens; the engine agrees."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_flash.server.driver import EngineDriver
from llama_flash.session.session import FlashSession
from llama_flash.session.steps import Beside, Steps, beside_drafts, filled, steps_of

DENSE = Path(str(resources.files("llama_flash") / "models" / "stdlib-arcee-q8_0.gguf"))
N = 4

lengths = st.lists(st.integers(0, 90), min_size=1, max_size=12)


@given(lengths, st.integers(1, 128))
def test_steps_compute_every_token_once(counts: list[int], n_ubatch: int) -> None:
    steps = steps_of(counts, n_ubatch)
    assert sum(steps) == sum(counts)
    assert all(0 < step <= max(n_ubatch, len(counts)) for step in steps)


@given(lengths, st.integers(16, 128), st.integers(0, 600), st.floats(0, 200))
def test_filling_up_never_costs_more_than_it_saves(
    counts: list[int], n_ubatch: int, room: int, per_step: float
) -> None:
    n_batch = sum(counts) + room
    found = filled(counts, n_ubatch, n_batch, per_step)
    assert len(found) == len(counts) and all(n >= had for n, had in zip(found, counts, strict=True))
    assert sum(found) <= n_batch

    def cost(of: list[int]) -> float:
        return len(steps_of(of, n_ubatch)) * per_step + sum(of)

    assert cost(found) <= cost(counts) + 1e-6
    active = [i for i, n in enumerate(counts) if n]
    outside = [n for i, n in enumerate(found) if not active or not active[0] <= i <= active[-1]]
    assert not any(outside), "nobody is behind them"


def test_an_idle_sequence_and_a_shorter_one_are_filled() -> None:
    assert filled([1, 0, 1, 1], 512, 512, 16.0) == [1, 1, 1, 1]
    assert filled([40, 43, 41, 44], 512, 512, 16.0) == [44, 44, 44, 44]
    assert filled([1, 1, 1, 300], 512, 512, 16.0) == [1, 1, 1, 300], "two steps are cheaper than 900 tokens"
    assert filled([1, 0, 1, 1], 512, 512, 0.0) == [1, 0, 1, 1], "a step costs nothing"


@pytest.mark.parametrize("per_step", [0.5, 8.0, 60.0])
def test_what_a_step_is_worth_is_learnt(per_step: float) -> None:
    steps, dice = Steps(512, 2048), np.random.default_rng(5)
    for _ in range(60):
        counts = dice.integers(1, 60, size=8).tolist() if dice.random() < 0.3 else [1] * 8
        found = steps.even(counts)
        seconds = 0.01 * (len(steps_of(found, 512)) * per_step + sum(found)) * dice.uniform(0.9, 1.1)
        steps.took(sum(found), 8, seconds)
    assert steps.per_step == pytest.approx(per_step, rel=0.25, abs=0.5)


def test_a_call_that_generates_has_no_more_tokens_than_a_call_may_have() -> None:
    apart = [2, 0, 2, 0, 2, 0, 2, 0]  # fourteen tokens would save two steps
    assert Steps(8, 8, few=16).even(apart) == apart


def test_what_a_pass_has_beside_drafts() -> None:
    steps = Steps(512, 512, few=16)
    assert beside_drafts(steps, 2, [0, 3], []) == Beside(), "the engine has not asked: it cannot remove what fills"
    steps.even([1, 0, 0, 1])
    assert beside_drafts(steps, 1, [0], []) == Beside() == beside_drafts(steps, 4, [0, 1, 2, 3], [])
    assert beside_drafts(steps, 2, [0, 3], []) == Beside(idle=2)
    assert beside_drafts(steps, 1, [1], [(3, 1), (0, 1)]) == Beside(others=2, idle=1, fills=True)
    assert beside_drafts(steps, 1, [1], [(3, 5), (0, 1)]) == Beside(prompts=6)
    assert beside_drafts(steps, 2, [1, 2], [(0, 40)]) == Beside(), "it is no pass that generates"
    assert beside_drafts(steps, 3, [1, 2], []) == Beside(others=1) == beside_drafts(None, 2, [1, 2], [(0, 1)])
    assert beside_drafts(steps, 1, [], [(0, 1)]) == Beside(others=1)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]])
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 2, 5, 2], [1, 0, 2, 2], [3, 3, 0, 3]])
def test_the_engine_takes_as_many_steps_whatever_the_order_of_sequences(order: list[int], counts: list[int]) -> None:
    """A step passes each panel once."""
    context_of = llama_cpp.llama_context_default_params()
    context_of.n_ctx, context_of.n_batch, context_of.n_ubatch = N * 256, 256, 256
    context_of.n_seq_max = context_of.n_outputs_max = N
    context_of.n_threads = context_of.n_threads_batch = 1
    sessions: list[FlashSession] = []
    driver = EngineDriver({"what": "all", "warm_start": False}, sessions.append)
    model = driver.load(str(DENSE), llama_cpp.llama_model_default_params(), context_of)
    context = driver.init(model, context_of)
    assert context, driver.failure
    native = sessions[0].native
    assert native is not None

    def passed() -> int:
        now = native.stats()
        return int(now.panel_hits + now.panel_reads)

    def decode(sequences: list[int], tokens: list[int], first: int) -> int:
        before, batch = passed(), llama_cpp.llama_batch_init(64, 0, 1)
        _fill(batch, sequences, tokens, first)
        assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_batch_free(batch)
        return passed() - before

    one = decode(list(range(N)), [1] * N, 0)
    assert decode(order, counts, 1) == one * len(steps_of(counts, 256))
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    driver.freed(model)


def _fill(batch: Any, sequences: list[int], counts: list[int], first: int) -> None:
    """counts[i] tokens of sequence i, the sequences in this order."""
    at = 0
    for sequence in sequences:
        for position in range(counts[sequence]):
            batch.token[at], batch.pos[at] = 5 + at, first + position
            batch.logits[at] = position == counts[sequence] - 1  # a step without any leaves out the output matrix
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            at += 1
    batch.n_tokens = at
