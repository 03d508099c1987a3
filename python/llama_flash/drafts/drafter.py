"""Drafts for one model: asked with each text so far, gives tokens that the next pass checks with it.

For `llama_cpp.Llama` it is what upstream calls a draft model, and has one text; a server has one for each sequence.
Nobody tells it which guesses were taken: the texts of the next call do. How long passes took it is told by the session
(`passed`). A source that fails ends the drafts, and no answer.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ..errors import FlashError
from ..native.prompts import Tokens
from ..observe.stats import DraftStats
from ..planning.lent import FEW_TOKENS
from .acceptance import Acceptance
from .length import MOST, Length
from .passes import Passes

__all__ = ["Drafter", "Source"]

logger = logging.getLogger("llama_flash")

_LAST = 4096  # checked drafts that are remembered
_FILLED = -1  # in place of a kind: no guess, but a token that makes the draft as long as the others


class Source(Protocol):
    """Where the guesses at one text come from."""

    @property
    def name(self) -> str:
        """ "ngram" or "model"."""

    @property
    def assumed(self) -> Sequence[float]:
        """Chances by kind, before anything was seen."""

    def follow(self, text: Tokens) -> int:
        """The text has become this one. Returns how many of its tokens are new."""

    def guesses(self) -> Iterator[tuple[int, int]]:
        """Tokens that may come next, one after the other, each with its kind. Not more are made than are asked for."""

    def close(self) -> None:
        """Gives back what it holds."""


@dataclass
class _Text:
    """A text, and the draft behind it that the pass under way checks."""

    source: Source
    at: int = -1  # tokens of the text when the draft was made; -1: there is none
    draft: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def begin(self, n_tokens: int) -> None:
        self.at, self.draft, self.kinds = n_tokens, [], []


class Drafter:
    """Of one model.

    Args:
        source: makes the source of the text with this number; that of text 0 is made at once.
        n_ctx: tokens of a text, at most.
        n_vocab: behind a text with other tokens than these, such as pictures, nothing is drafted.
        assumed: see Passes.
        most: drafted tokens of a pass.
        reason: as in DraftStats.
    """

    def __init__(
        self,
        source: Callable[[int], Source],
        n_ctx: int,
        n_vocab: int,
        assumed: Callable[[int], float],
        most: int = MOST,
        clock: Callable[[], float] = time.perf_counter,
        reason: str = "",
    ) -> None:
        self.passes = Passes(assumed)
        self.last: deque[tuple[int, int, float, float]] = deque(maxlen=_LAST)  # drafted, taken, seconds: pass, drafting
        self._source, self._n_ctx, self._n_vocab, self._clock = source, n_ctx, n_vocab, clock
        self._texts = {0: _Text(source(0))}
        first = self._texts[0].source
        self._costs = first.name != "ngram"  # guesses take time
        self._length = Length(self.passes, min(most, MOST))
        self._acceptance = Acceptance(first.assumed)
        self._stats = DraftStats(source=first.name, reason=reason)
        self._asked: list[_Text] = []  # texts that go on in the pass under way
        self._others = 0  # ... and were not asked for
        self._idle = 0  # texts that do not, and have tokens in it
        self._fills = False  # the others have as many as the first ones
        self._spent = 0.0  # seconds of drafting for it
        self._once = 0.0  # of them the reading of texts that are new
        self._pass = 0.0  # seconds of it; 0: it was not made yet
        self._accepted: Callable[[int], None] = lambda n: None
        self._failed = False

    def on_accepted(self, callback: Callable[[int], None]) -> None:
        """Calls `callback(n)` when it is known how many drafted tokens a pass has brought."""
        self._accepted = callback

    @property
    def n_drafted(self) -> int:
        """Tokens that the pass under way checks."""
        return sum(len(text.draft) for text in self._asked)

    @property
    def stats(self) -> DraftStats:
        return self._stats

    def __call__(self, input_ids: Tokens, /, **_: Any) -> Tokens:
        """The draft behind the only text."""
        (draft,) = self.draft([(0, input_ids, self._n_ctx, self._n_ctx)])
        return draft

    def draft(
        self,
        asked: Sequence[tuple[int, Tokens, int, int]],
        others: int = 0,
        idle: int = 0,
        fills: bool = False,
        prompts: int = 0,
    ) -> list[Tokens]:
        """The drafts behind texts that go on in the next pass; each: its number, its tokens, tokens of a draft that can
        be of use, and tokens of a draft at most.

        A pass that has tokens besides teaches nothing.

        Args:
            others: texts that go on with one token, and are not asked for.
            idle: texts that do not go on, and have as many tokens in the pass as each of the others.
            fills: the others have as many tokens, too: the pass is one step.
            prompts: tokens of prompts in the pass, if those are few.
        """
        self._settle({number: tokens for number, tokens, *_ in asked})
        began = self._clock()
        self._once, self._others, self._idle, self._fills = 0.0, others, idle, fills
        n_texts = len(asked) + others
        n_rows = n_texts + idle
        for number, tokens, *_ in asked:
            if number not in self._texts:
                self._texts[number] = _Text(self._source(number))
            self._texts[number].begin(len(tokens))
            self._asked.append(self._texts[number])
        if asked and not self._failed and self._begins(n_texts):
            room = min(min(most, self._n_ctx - len(tokens) - 1) for _, tokens, _, most in asked)
            room = min(room, self._length.most, (FEW_TOKENS - prompts - n_rows) // n_rows)
            try:
                if room > 0:
                    self._make_all(asked, room, others)
            except FlashError as error:
                self.fail(error)
        self._spent = self._clock() - began
        return [np.array(text.draft, np.intc) for text in self._asked]

    def _begins(self, n_texts: int) -> bool:
        return self._length.begins(self._acceptance.mean if self._costs else 1.0, n_texts, self._idle)

    @property
    def has_failed(self) -> bool:
        return self._failed

    @property
    def has_credit(self) -> bool:
        """Whether drafts may take any time now."""
        return self._length.has_credit

    def followed(self, seconds: float) -> None:
        """What was computed took the source so long to follow."""
        self._length.spent(seconds)
        self._stats = replace(self._stats, draft_seconds=self._stats.draft_seconds + seconds)

    def fail(self, error: Exception) -> None:
        """No more drafts are made, because of this."""
        self._failed = True
        logger.warning("no more drafts: %s", error)
        self._stats = replace(self._stats, reason=f"they have ended: {error}")
        for text in self._asked:
            text.begin(text.at)

    def _make_all(self, asked: Sequence[tuple[int, Tokens, int, int]], room: int, others: int) -> None:
        useful = [
            0 if tokens.min() < 0 or tokens.max() >= self._n_vocab else min(room, use) for _, tokens, use, _ in asked
        ]
        if len(asked) + others + self._idle > 1:
            self._make_common([tokens for _, tokens, *_ in asked], useful, room, others)
        elif useful[0] > 0:
            self._make(self._asked[0], asked[0][1], useful[0])

    def _make(self, text: _Text, tokens: Tokens, room: int) -> None:
        """Makes a draft behind the only text, while a further guess is worth its time."""
        length, acceptance = self._length, self._acceptance
        began = self._clock()
        if self._follow(text, tokens):
            began = self._clock()
        guesses = text.source.guesses()
        chances: list[float] = []
        expected, reach, ready = 1.0, 1.0, self._clock()
        while len(chances) < room:
            spent = self._clock() - began if self._costs else 0.0
            if self._costs and not length.goes_on(1 + len(chances), expected, reach, spent, acceptance.mean):
                break
            if not self._guess(text, guesses, chances):
                break
            reach *= chances[-1]
            expected += reach
        if self._costs and chances:
            length.took_to_guess((self._clock() - ready) / len(chances))
        n = length.best(1, 1.0, chances, self._clock() - began if self._costs else 0.0)
        del text.draft[n:], text.kinds[n:]

    def _make_common(self, texts: Sequence[Tokens], useful: Sequence[int], room: int, others: int) -> None:
        """Makes drafts of one length behind several texts. Each has so many guesses at most; what is missing is filled.

        others: texts of the pass without a draft.
        """
        began = self._clock()
        found: list[list[float]] = []
        for text, tokens, most in zip(self._asked, texts, useful, strict=True):
            chances = list[float]()
            if most > 0:
                self._follow(text, tokens)
                guesses, ready = text.source.guesses(), self._clock()
                while len(chances) < most and self._guess(text, guesses, chances):
                    pass
                if self._costs and chances:
                    self._length.took_to_guess((self._clock() - ready) / len(chances))
            found.append(chances)
        spent = self._clock() - began - self._once if self._costs else 0.0
        n = self._length.common(found, spent, room, others, self._idle, fills=self._fills) if any(found) else 0
        for text, tokens in zip(self._asked, texts, strict=True):
            del text.draft[n:], text.kinds[n:]
            missing = n - len(text.draft)
            last = int(tokens[-1])
            text.draft += missing * [last if 0 <= last < self._n_vocab else 0]
            text.kinds += missing * [_FILLED]

    def _follow(self, text: _Text, tokens: Tokens) -> bool:
        """The source reads what is new of the text. Returns whether that was more than goes on with each pass."""
        began = self._clock()
        if text.source.follow(tokens) <= self._length.most + 1:
            return False
        self._once += self._clock() - began
        return True

    def _guess(self, text: _Text, guesses: Iterator[tuple[int, int]], chances: list[float]) -> bool:
        """One more guess behind the text, and its chance. False: there is none."""
        guess = next(guesses, None)
        if guess is None:
            return False
        token, kind = guess
        text.draft.append(token)
        text.kinds.append(kind)
        chances.append(self._acceptance.chance(kind))
        return True

    def passed(self, n_tokens: int, seconds: float, n_computed: int = 0) -> bool:
        """The engine has computed so many tokens. Returns whether they were the texts' next ones and their drafts.

        n_computed: with those of idle sequences; 0: there are none.
        """
        if not self._asked or n_tokens != len(self._asked) + self._others + self.n_drafted:
            self._forget()
            return False
        self._pass = seconds
        n_rows, n_computed = len(self._asked) + self._others + self._idle, n_computed or n_tokens
        each = 1 + self.n_drafted // len(self._asked)
        if not self._others or each == 1 or n_computed == n_rows * each:  # else it was made in two steps
            self.passes.add(n_computed, seconds, n_rows)
        return True

    def _settle(self, texts: dict[int, Tokens]) -> None:
        """Learns from the texts what has become of the last drafts."""
        asked, took = self._asked, self._pass
        drafted, taken, all_known = self.n_drafted, 0, bool(took)
        for number, text in self._texts.items():
            if took and text in asked:
                n = self._taken(text, texts.get(number))
                all_known = all_known and n is not None
                taken += n or 0
        if all_known:
            counted = self._spent - self._once
            n_texts = len(asked) + self._others
            self._length.checked(n_texts, drafted, n_texts + taken, took, counted, self._idle)
            self._stats = self._stats.plus(n_texts, drafted, taken, took, self._spent)
            if drafted:
                self.last.append((drafted, taken, took, self._spent))
        if taken:
            self._accepted(taken)
        self._forget()

    def _taken(self, text: _Text, now: Tokens | None) -> int | None:
        """Tokens of its draft that are in the text now, before one that the model has said; None: another text."""
        at, draft = text.at, text.draft
        if now is None or not at < len(now) <= at + len(draft) + 1:
            return None
        taken = len(now) - at - 1
        if draft[:taken] != now[at : at + taken].tolist():
            return None
        for kind, right in zip(text.kinds, [True] * taken + [False], strict=False):
            if kind != _FILLED:
                self._acceptance.add(kind, right)
        return taken

    def _forget(self) -> None:
        for text in self._asked:
            text.begin(-1)
        self._asked, self._spent, self._once, self._pass = [], 0.0, 0.0, 0.0

    def close(self) -> None:
        for text in self._texts.values():
            text.source.close()
