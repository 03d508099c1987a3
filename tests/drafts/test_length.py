"""How many tokens are drafted: what wins is taken, what loses is left alone, whatever was expected beforehand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from llama_flash.drafts.drafter import Drafter
from llama_flash.drafts.length import MOST
from llama_flash.drafts.ngram import TextDraft
from llama_flash.drafts.passes import Passes
from llama_flash.errors import FlashError

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
    first: float = 1.0,
) -> float:
    """Times that of passes with one token; the first pass takes `first` times as long as others, and is not counted."""
    rng = random.Random(1)
    said = text[: prompt + 1]
    while len(said) < len(text):
        draft = drafter(np.array(said, np.intc)).tolist()
        seconds = ONE * shape(1 + len(draft)) * (1 + rng.uniform(-noise, noise))
        clock.now += seconds
        seconds *= first
        first = 1.0
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


@pytest.mark.parametrize("further", [0.04, 0.06])
def test_a_cold_first_pass_does_not_make_drafts_too_long(further: float) -> None:
    """There is hardly another one without a draft: those with drafts show that it took longer than it would."""

    def sloping(n: int) -> float:
        return 1 + further * (n - 1)

    chance, seconds = 0.7, 0.002
    text, clock = unique(500), Clock()
    drafter = Drafter(lambda _: Guesser(text, chance, clock, seconds), 8192, 10**6, flat, clock=clock)
    got = speed(text, sloping, drafter, clock, first=4.0)
    best = max(
        sum(chance**i for i in range(k + 1)) * ONE / (ONE * sloping(k + 1) + (k + 1) * seconds) for k in range(MOST + 1)
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
        asked = [(number, np.array(each, np.intc), 100, 100) for number, each in said.items()]
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
        drafts = drafter.draft([(i, np.array(text[:n], np.intc), 4096, 4096) for i, n in enumerate(said)])
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


@pytest.mark.parametrize("useful", [0, 1, 100])
def test_a_text_without_guesses_has_a_draft_as_long_as_the_others(useful: int) -> None:
    """So that the pass reads the weights once; its tokens are never right, and teach nothing."""
    clock = Clock()
    drafter = Drafter(lambda _: TextDraft(), 4096, 10**6, flat, clock=clock)
    repeats, news = [1, 2, 3, 4] * 20, unique(80)
    lengths = set()
    for i in range(20):
        asked = [(0, np.array(repeats, np.intc), 100, 100), (1, np.array(news, np.intc), useful, 100)]
        drafts = drafter.draft(asked)
        assert len(drafts[0]) == len(drafts[1])
        lengths.add(len(drafts[0]))
        assert drafter.passed(2 + len(drafts[0]) + len(drafts[1]), ONE)
        repeats += [1 + (len(repeats) + j) % 4 for j in range(1 + len(drafts[0]))]
        news += [1000 + i]
    assert max(lengths) >= 4
    assert drafter.stats.accepted > 20
    kinds = [drafter._acceptance.chance(kind) for kind in range(len(TextDraft.assumed))]
    assert all(chance >= assumed for chance, assumed in zip(kinds, TextDraft.assumed, strict=True)), (
        "no guess was wrong"
    )


def test_beside_a_text_that_has_one_token_drafts_are_made_where_they_pay_for_a_second_step() -> None:
    clock = Clock()
    text = unique(800)
    for chance, pays in ((0.3, False), (0.95, True)):
        drafter = Drafter(lambda i, c=chance: Guesser(text, c, clock, 0.0), 4096, 10**6, flat, clock=clock)  # type: ignore[misc]
        said, made = [100, 100], list[bool]()
        while max(said) < 500:
            drafts = drafter.draft([(i, np.array(text[:n], np.intc), 400, 400) for i, n in enumerate(said)], 1)
            n_drafted = sum(map(len, drafts))
            made.append(n_drafted > 0)
            assert drafter.passed(3 + n_drafted, ONE * (2 if n_drafted else 1))
            for i, draft in enumerate(drafts):
                right = draft == np.array(text[said[i] : said[i] + len(draft)])
                said[i] += int(np.cumprod(right).sum()) + 1
        assert all(made[-30:]) if pays else sum(made) <= 3


@pytest.mark.parametrize("n_texts", [1, 2])
def test_idle_texts_in_a_pass_leave_less_room_and_are_part_of_what_it_takes(n_texts: int) -> None:
    clock, idle = Clock(), 3
    text = unique(900)
    drafter = Drafter(lambda i: Guesser(text, 0.9, clock, 0.0), 4096, 10**6, flat, clock=clock)
    said, longest = [100] * n_texts, 0
    while max(said) < 700:
        asked = [(i, np.array(text[:n], np.intc), 4096, 4096) for i, n in enumerate(said)]
        drafts = drafter.draft(asked, 0, idle)
        each = 1 + len(drafts[0])
        assert {1 + len(draft) for draft in drafts} == {each} and (n_texts + idle) * each <= 16
        longest = max(longest, each)
        assert drafter.passed(n_texts * each, ONE, (n_texts + idle) * each)
        for i, draft in enumerate(drafts):
            said[i] += int(np.cumprod(draft == np.array(text[said[i] : said[i] + len(draft)])).sum()) + 1
    assert longest == 16 // (n_texts + idle)


def test_others_that_are_filled_up_leave_less_room_and_make_no_second_step() -> None:
    clock, others = Clock(), 3
    text = unique(900)
    drafter = Drafter(lambda i: Guesser(text, 0.95, clock, 0.0), 4096, 10**6, flat, clock=clock)
    said, lengths = 100, list[int]()
    while said < 500:
        (draft,) = drafter.draft([(0, np.array(text[:said], np.intc), 4096, 4096)], others, fills=True)
        lengths.append(len(draft))
        each = 1 + len(draft)
        assert (1 + others) * each <= 16
        assert drafter.passed(each + others, ONE, (1 + others) * each)
        said += int(np.cumprod(draft == np.array(text[said : said + len(draft)])).sum()) + 1
    assert lengths.count(3) > 0.9 * len(lengths)
    assert drafter.passes.seconds(16) < 1.2 * drafter.passes.seconds(4), "they were one step"


def test_prompts_of_few_tokens_leave_room_for_few_drafted_ones() -> None:
    clock = Clock()
    text = unique(900)
    drafter = Drafter(lambda i: Guesser(text, 0.95, clock, 0.0), 4096, 10**6, flat, clock=clock)
    said = 100
    for _ in range(40):  # what passes take is known then
        (draft,) = drafter.draft([(0, np.array(text[:said], np.intc), 4096, 4096)])
        assert drafter.passed(1 + len(draft), ONE)
        said += int(np.cumprod(draft == np.array(text[said : said + len(draft)])).sum()) + 1
    assert len(draft) > 9
    (draft,) = drafter.draft([(0, np.array(text[:said], np.intc), 4096, 4096)], prompts=6)
    assert len(draft) == 9


def test_a_cold_first_pass_of_several_texts_is_not_what_passes_take() -> None:
    """No pass has one token: what it takes is known from those with one of each."""
    passes = Passes(flat)
    passes.add(4, 10 * ONE, 4)
    for _ in range(12):
        passes.add(4, ONE, 4)
    for _ in range(12):
        passes.add(16, 2 * ONE, 4)
    assert passes.seconds(4) == pytest.approx(ONE, rel=0.25)
    assert passes.seconds(16) == pytest.approx(2 * ONE, rel=0.25)


def test_a_source_that_fails_ends_the_drafts_and_says_so() -> None:
    class Failing(Guesser):
        def guesses(self) -> Iterator[tuple[int, int]]:
            yield 1, 0
            raise FlashError("it broke")

    clock = Clock()
    drafter = Drafter(lambda _: Failing([], 1.0, clock, 0.0), 4096, 10**6, flat, clock=clock)
    for n in range(20, 60):
        draft = drafter(np.arange(n, dtype=np.intc))
        assert len(draft) == 0
        assert drafter.passed(1, ONE)
    assert "it broke" in drafter.stats.reason and "it broke" in str(drafter.stats)
