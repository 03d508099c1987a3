"""Drafts from the text itself: what followed the longest match, wherever the text has been cut or changed."""

from __future__ import annotations

from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_flash.drafts.ngram import TextDraft

LONGEST = 32  # tokens that are compared
PLACES = 24


def array(text: list[int]) -> np.ndarray:
    return np.array(text, np.intc)


def guessed(draft: TextDraft, n: int) -> list[int]:
    return [token for token, _ in islice(draft.guesses(), n)]


def expected(text: list[int], n: int) -> tuple[int, list[int]]:
    """By looking everywhere: the length of the longest match, and what follows its latest place."""
    best = at = 0
    places = [i for i in range(len(text) - 1) if text[i] == text[-1]][-PLACES:]
    for place in reversed(places):
        matched = 1
        while matched < min(LONGEST, place + 1) and text[place - matched] == text[-1 - matched]:
            matched += 1
        if matched > best:
            best, at = matched, place + 1
    going = list(text)
    for i in range(n if best else 0):
        going.append(going[at + i])
    return best, going[len(text) :]


texts = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=40), min_size=1, max_size=6)


@given(texts)
def test_whatever_text_follows_another_the_longest_match_is_found(each: list[list[int]]) -> None:
    draft = TextDraft()
    for text in each:
        draft.follow(array(text[: len(text) // 2]))
        draft.follow(array(text))
        best, following = expected(text, 6)
        if best >= 3 or not best:  # shorter ones may give way to where the text was before
            fresh = TextDraft()
            fresh.follow(array(text))
            assert guessed(fresh, 6) == following
        if best >= 3:
            assert guessed(draft, 6) == following


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 29), st.lists(st.integers(0, 3), max_size=9)
)
def test_a_text_that_was_cut_is_followed_as_if_it_had_never_been_longer(
    text: list[int], keep: int, more: list[int]
) -> None:
    cut, fresh = TextDraft(), TextDraft()
    cut.follow(array(text))
    after = [*text[:keep], *more] or [0]
    cut.follow(array(after))
    fresh.follow(array(after))
    if expected(after, 1)[0] >= 3:
        assert guessed(cut, 5) == guessed(fresh, 5)
    assert cut._places.keys() >= set(after)
    assert {token: places for token, places in cut._places.items() if places} == fresh._places


def test_behind_a_changed_token_the_copy_goes_on() -> None:
    source = list(range(100, 130))
    draft = TextDraft()
    copied = source + source[:10]
    draft.follow(array(copied))
    assert guessed(draft, 4) == source[10:14]
    draft.follow(array([*copied, source[10], 7]))  # in place of source[11]
    assert guessed(draft, 4) == source[12:16]


def test_what_took_the_place_of_tokens_is_expected_to_do_so_again() -> None:
    """A name that is changed in a copy, whatever tokens it has."""
    for old, new in ((500,), (600,)), ((500, 501), (600,)), ((500,), (600, 601, 602)):
        source = [1, 2, 3, *old, 4, 5, 6, 7, *old, 8, 9, 10, *old, 11, 12, 13, 14]
        copy = [1, 2, 3, *new, 4, 5, 6, 7, *new, 8, 9, 10, *new, 11, 12, 13]
        draft = TextDraft()
        draft.follow(array([*source, 1, 2, 3]))
        assert guessed(draft, 1) == [old[0]]
        for n in range(3, 4 + len(new)):  # the name, and the token behind it
            draft.follow(array([*source, *copy[: n + 1]]))
        for n in range(4 + len(new), len(copy)):
            draft.follow(array([*source, *copy[:n]]))
            assert guessed(draft, len(copy) - n) == copy[n:], (old, new, n)


def test_a_name_that_is_not_changed_after_all_is_expected_as_it_was() -> None:
    source = [1, 2, 3, 500, 4, 5, 6, 500, 7, 8, 9, 500, 10, 11]
    draft = TextDraft()
    draft.follow(array([*source, 1, 2, 3]))
    guessed(draft, 1)
    for n in range(1, 5):
        draft.follow(array([*source, 1, 2, 3, *(600, 4, 5, 6)[:n]]))
    assert guessed(draft, 2) == [600, 7]
    draft.follow(array([*source, 1, 2, 3, 600, 4, 5, 6, 500, 7, 8, 9]))
    assert guessed(draft, 2) == [500, 10]


def test_a_text_that_repeats_nothing_is_not_guessed_at() -> None:
    draft = TextDraft()
    draft.follow(array(list(range(50))))
    assert guessed(draft, 4) == []
