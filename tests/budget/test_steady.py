"""The reserve of models that decode, from how what is taken beside flash memory moves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llama_flash.budget.rooms import STEADY_MIN, default_reserve, reserve_of, steady_reserve
from llama_flash.budget.steady import Steady

MiB = 1 << 20


def test_nothing_is_known_before_some_looks() -> None:
    steady = Steady()
    assert [steady.look(seconds, taken, True) for seconds, taken in ((0.0, 0), (0.3, 3))] == [None] * 2, "first tokens"
    assert [steady.look(seconds, 5, True) for seconds in (0.6, 0.9, 1.2, 1.5)] == [None] * 4
    assert steady.look(1.8, 5, True) == 0


def test_the_largest_rise_is_remembered_for_a_while() -> None:
    steady = Steady()
    for seconds, taken in ((-1.0, 0), (0.0, 10), (1.0, 30), (2.0, 25), (3.0, 35)):
        rise = steady.look(seconds, taken, True)
    assert rise == 20
    assert steady.look(62.0, 35, True) == 10, "the first rise is out of sight"
    for seconds in range(63, 66):
        rise = steady.look(float(seconds), 35, True)
    assert rise == 0


def test_another_kind_of_work_begins_anew() -> None:
    steady = Steady()
    for seconds in range(4):
        rise = steady.look(float(seconds), 50 * seconds, True)
    assert rise == 50
    assert steady.look(4.0, 0, False) is None
    assert steady.look(5.0, 0, True) is None


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 36))
def test_never_more_than_without_looking(total: int, rise: int) -> None:
    assert min(STEADY_MIN, default_reserve(total)) <= steady_reserve(total, rise) <= default_reserve(total)
    assert reserve_of(total, "5MiB", rise) == 5 * MiB, "what the user sets stands"
    assert reserve_of(total, None, None) == default_reserve(total)
