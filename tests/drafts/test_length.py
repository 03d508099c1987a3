"""How many tokens are drafted: what wins is taken, what loses is left alone, whatever was expected beforehand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from llama_flash.drafts.drafter import Drafter
from llama_flash.drafts.length import MOST
from llama_flash.drafts.ngram import TextDraft

ONE = 0.1  # seconds of a pass with one token


def flat(n: int) -> float:
    return 1 + 0.003 * (n - 1)


def steep(n: int) -> float:
    return 1 + 0.75 * (n - 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Guesser:
    """Guesses right with a chance that it knows, and takes its time."""

    name = "model"
    assumed = (0.5,)

    def __init__(self, text: list[int], chance: float, clock: Clock, seconds: float) -> None:
        self._text, self._chance, self._clock, self._seconds = text, chance, clock, seconds
        self._rng = random.Random(3)
        self._at = 0

    def follow(self, text: np.ndarray) -> int:
        self._at = len(text)
        self._clock.now += self._seconds
        return 1

    def guesses(self) -> Iterator[tuple[int, int]]:
        for token in self._text[self._at :]:
            self._clock.now += self._seconds
            yield (token if self._rng.random() < self._chance else 999_999), 0

    def close(self) -> None:
        pass


def speed(
    text: list[int],
    shape: Callable[[int], float],
    drafter: Drafter,
    clock: Clock,
    prompt: int = 100,
    noise: float = 0.1,
) -> float:
    """Times that of passes with one token."""
    rng = random.Random(1)
    said = text[: prompt + 1]
    while len(said) < len(text):
        draft = drafter(np.array(said, np.intc)).tolist()
        seconds = ONE * shape(1 + len(draft)) * (1 + rng.uniform(-noise, noise))
        clock.now += seconds
        assert drafter.passed(1 + len(draft), seconds)
        n = 0
        while n < len(draft) and len(said) + n < len(text) and draft[n] == text[len(said) + n]:
            n += 1
        said += text[len(said) : len(said) + n + 1]
    return ONE * (len(text) - prompt - 1) / clock.now


def unique(n: int) -> list[int]:
    return list(range(n))


def skewed(n: int) -> list[int]:
    rng = random.Random(0)
    return [int(rng.paretovariate(0.7)) % 4000 for _ in range(n)]


def edited(n: int) -> list[int]:
    source = unique(n // 2)
    return source + [9999 if i % 16 == 15 else token for i, token in enumerate(source)]


TEXTS = {"unique": unique(1000), "skewed": skewed(1000), "edited": edited(1000)}


@pytest.mark.parametrize("assumed", [flat, steep])
@pytest.mark.parametrize("name", TEXTS)
def test_where_every_token_costs_ngrams_lose_next_to_nothing(name: str, assumed: Callable[[int], float]) -> None:
    clock = Clock()
    drafter = Drafter(lambda _: TextDraft(), 4096, 10**6, assumed, clock=clock)
    assert speed(TEXTS[name], steep, drafter, clock) > 0.97


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("seconds", [0.02, 0.3])
def test_a_model_that_does_not_pay_is_left_alone(chance: float, seconds: float) -> None:
    clock = Clock()
    text = unique(1500)
    source = Guesser(text, chance, clock, seconds)
    drafter = Drafter(lambda _: source, 4096, 10**6, flat, clock=clock)
    assert speed(text, steep, drafter, clock) > 0.96


def test_a_copy_with_changes_is_many_times_as_fast_where_a_pass_costs_the_same() -> None:
    clock = Clock()
    drafter = Drafter(lambda _: TextDraft(), 4096, 10**6, flat, clock=clock)
    assert speed(TEXTS["edited"], flat, drafter, clock, prompt=500) > 6


@pytest.mark.parametrize("chance", [0.5, 0.7, 0.9])
def test_drafts_of_a_model_come_near_to_the_best_length(chance: float) -> None:
    """Against every fixed length, each with the chances known."""
    seconds = 0.01
    text = unique(4000)
    clock = Clock()
    source = Guesser(text, chance, clock, seconds)
    drafter = Drafter(lambda _: source, 8192, 10**6, flat, clock=clock)
    got = speed(text, flat, drafter, clock, noise=0.0)
    best = max(
        sum(chance**i for i in range(k + 1)) * ONE / (ONE * flat(k + 1) + (k + 1) * seconds) for k in range(MOST + 1)
    )
    assert got > 0.9 * best


def test_the_end_of_the_context_is_not_drafted_beyond() -> None:
    text = [1, 2, 3, 4] * 8
    clock = Clock()
    drafter = Drafter(lambda _: TextDraft(), 32, 10**6, flat, clock=clock)
    for n in range(6, 33):
        draft = drafter(np.array(text[:n], np.intc))
        assert len(draft) <= max(0, 32 - n - 1)
        drafter.passed(1 + len(draft), ONE)


def test_several_texts_share_a_pass_and_each_gets_its_part() -> None:
    """Four copies with changes: three drafted tokens each, and a pass has sixteen at most."""
    clock = Clock()
    drafter = Drafter(lambda _: TextDraft(), 4096, 10**6, flat, clock=clock)
    text = edited(600)
    said = {number: text[: 320 + 7 * number] for number in range(4)}
    passes = 0
    while all(len(each) < len(text) - 16 for each in said.values()):
        asked = [(number, np.array(each, np.intc), 100) for number, each in said.items()]
        drafts = [draft.tolist() for draft in drafter.draft(asked)]
        n_tokens = 4 + sum(map(len, drafts))
        assert n_tokens <= 16
        assert drafter.passed(n_tokens, ONE * flat(n_tokens))
        passes += 1
        for each, draft in zip(said.values(), drafts, strict=True):
            n = 0
            while n < len(draft) and draft[n] == text[len(each) + n]:
                n += 1
            each += text[len(each) : len(each) + n + 1]
    gained = sum(len(each) for each in said.values()) - sum(320 + 7 * number for number in range(4))
    assert gained / passes > 4 * 3
    assert drafter.stats.tokens_per_pass == pytest.approx((gained) / passes, rel=0.05)


def test_behind_what_is_no_token_nothing_is_drafted() -> None:
    clock = Clock()
    for picture in (-1, 4000):
        drafter = Drafter(lambda _: TextDraft(), 512, 4000, flat, clock=clock)
        text = [1, 2, 3, picture, 5, 6] * 9
        for n in range(20, 50):
            draft = drafter(np.array(text[:n], np.intc))
            assert len(draft) == 0
            drafter.passed(1, ONE)


@pytest.mark.parametrize("n_texts", [2, 3, 4])
def test_drafts_of_several_texts_have_one_length_and_pay(n_texts: int) -> None:
    clock = Clock()
    text = unique(600)
    chances = [0.9 - 0.1 * i for i in range(n_texts)]
    drafter = Drafter(lambda i: Guesser(text, chances[i], clock, 0.001), 4096, 10**6, flat, clock=clock)
    said, passes, width = [100] * n_texts, 0, 0
    while max(said) < 500:
        drafts = drafter.draft([(i, np.array(text[:n], np.intc), 4096) for i, n in enumerate(said)])
        assert len({len(draft) for draft in drafts}) == 1
        width = n_texts + sum(map(len, drafts))
        assert width <= 16
        clock.now += ONE * flat(width)
        assert drafter.passed(width, ONE * flat(width))
        passes += 1
        for i, draft in enumerate(drafts):
            right = draft == np.array(text[said[i] : said[i] + len(draft)])
            said[i] += int(np.cumprod(right).sum()) + 1
    assert drafter.stats.drafted > 0
    assert sum(said) - 100 * n_texts > 1.5 * n_texts * passes


def test_nothing_is_drafted_where_one_of_the_texts_has_no_guess_or_is_not_asked_for() -> None:
    clock = Clock()
    repeats, news = np.array([1, 2, 3, 4] * 20, np.intc), np.array(unique(80), np.intc)
    for second, others in ((news, 0), (repeats, 1)):
        drafter = Drafter(lambda _: TextDraft(), 4096, 10**6, flat, clock=clock)
        for _ in range(20):
            drafts = drafter.draft([(0, repeats, 100), (1, second, 100)], others)
            assert [len(draft) for draft in drafts] == [0, 0]
            assert drafter.passed(2 + others, ONE)
