"""Prompts of a batch begin in company, and neither wait for ever nor for what costs more than it brings."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_flash import complete_many
from llama_flash.batch.company import Company
from llama_flash.batch.order import by_length
from llama_flash.server.driver import EngineDriver

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))


def cost_of(company: Company | None, parallel: int, tokens: list[int]) -> tuple[int, int]:
    """Passes and further steps in which so many answers, of so many tokens, are generated; without a company each
    prompt begins at once."""
    todo, left = list(tokens), [0] * parallel
    passes = steps = 0
    while todo or any(left):
        free = [i for i, n in enumerate(left) if not n][: len(todo)]
        n_begun = sum(n > 0 for n in left)
        if free and (company is None or not company(len(free), n_begun)):
            steps += n_begun > 0
            for i in free:
                left[i] = todo.pop(0) + 1
        left = [max(0, n - 1) for n in left]
        passes += 1
        assert passes < 10_000
    return passes, steps


@pytest.mark.parametrize("parallel", [2, 8, 32])
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80))
def test_waiting_never_costs_more_than_all_the_steps_it_could_save(parallel: int, lengths: list[int]) -> None:
    ticks = iter(range(1, 10**9))
    company = Company(parallel, clock=lambda: float(next(ticks)))  # nobody else comes
    passes, steps = cost_of(company, parallel, lengths)
    at_once, each = cost_of(None, parallel, lengths)
    assert passes + steps <= 2 * (at_once + each) + 1


def test_answers_that_end_at_different_times_share_the_steps_of_their_prompts() -> None:
    lengths = [10 + 7 * i % 23 for i in range(400)]
    ticks = iter(range(1, 10**9))
    passes, steps = cost_of(Company(32, clock=lambda: float(next(ticks))), 32, lengths)
    at_once, each = cost_of(None, 32, lengths)
    assert steps < each / 3
    assert passes + steps < 0.9 * (at_once + each)


def test_a_prompt_beside_others_that_go_on_for_long_begins_in_the_end() -> None:
    company = Company(32)
    waited = 0
    while company(1, 31):
        waited += 1
    assert waited == 31


def test_where_nothing_computes_others_may_be_on_their_way_for_a_moment() -> None:
    now = [0.0]
    company = Company(4, clock=lambda: now[0])
    assert company(1, 0)
    now[0] += 0.015
    assert company(2, 0), "one came"
    now[0] += 0.015
    assert company(2, 0)
    now[0] += 0.015
    assert not company(2, 0), "no other came"
    assert not company(4, 0), "all are there"


@given(st.lists(st.integers(0, 50)))
def test_one_by_one_requests_keep_their_order(lengths: list[int]) -> None:
    assert list(by_length(lengths, int, 1)) == lengths


@given(st.lists(st.integers(0, 50)), st.integers(2, 8))
def test_all_are_asked_once_and_neighbours_are_alike(lengths: list[int], parallel: int) -> None:
    asked = list(by_length(enumerate(lengths), lambda one: one[1], parallel))
    assert Counter(asked) == Counter(enumerate(lengths))
    for first in range(0, len(asked), 8 * parallel):
        run = asked[first : first + 8 * parallel]
        assert run == sorted(run, key=lambda one: one[1])
        assert sorted(i for i, _ in run) == list(range(first, first + len(run))), "nothing is asked far from its place"


def test_a_prompt_that_waits_is_not_in_the_next_call_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, int]] = []
    hold, begin = Company.__call__, EngineDriver.begin

    def holds(self: Company, n_new: int, n_begun: int) -> bool:
        if held := hold(self, n_new, n_begun):
            said.append(("held beside", n_begun))
        return held

    def begins(self: EngineDriver, context: int, n_tokens: int, n_sequences: int) -> None:
        said.append(("computes", n_sequences))
        begin(self, context, n_tokens, n_sequences)

    monkeypatch.setattr(Company, "__call__", holds)
    monkeypatch.setattr(EngineDriver, "begin", begins)
    prompts = [f"{'    ' * (i % 4)}def call_{i}(" for i in range(24)]
    many = complete_many(SHIPPED, prompts, parallel=4, n_ctx=256, max_tokens=40, stop=[":", "\n"], seed=3)
    with many:
        assert sorted(one.index for one in many) == list(range(24))
    beside = [(n, after) for (what, n), after in pairwise(said) if what == "held beside" and n]
    assert beside, "answers end at different times"
    assert all(after == ("computes", n) for n, after in beside)
