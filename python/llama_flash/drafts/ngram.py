"""Drafts from the text itself: what followed the last time that the text went as it goes now."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

from ..native.prompts import Tokens

__all__ = ["TextDraft"]

_LONGEST = 32  # tokens that are compared
_PLACES = 24  # that are looked at, the latest
_MATCHED = (1, 2, 3, 4, 5, 7, 10, 16)  # tokens that have matched: a kind from each on
_ASSUMED = (0.15, 0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.9, 0.5, 0.75, 0.75)
_FIRST_ALIGNED, _ALIGNED = 8, 9  # kinds: behind tokens that took the place of others
_REPLACED = 10  # ... and one of those tokens, where it was so before
_CLEAR = 3  # tokens that have matched: clearer than where the text was before
_REMEMBERED = 8  # changes
_ASTRAY = 4  # tokens that may take the place of others, and those in whose place they are


class TextDraft:
    """Of one text at a time. A guess's kind is how many tokens before it were the same, those of the draft included.

    A text that goes as it went before may have other tokens in one place, such as a name that is changed in a copy.
    What it was changed from and to is remembered, and expected to be so again.
    """

    name = "ngram"
    assumed: Sequence[float] = _ASSUMED

    def __init__(self) -> None:
        self._text: list[int] = []
        self._seen: Tokens = np.zeros(0, np.intc)
        self._places: dict[int, list[int]] = {}  # of each token, in the order of the text
        self._beside = -1  # place that the text's end corresponds to; -1: none is known
        self._parted: tuple[int, int] | None = None  # that place, and the text's, where tokens began to be others
        self._instead: dict[tuple[int, ...], tuple[int, ...]] = {}  # tokens, and those that took their place

    def follow(self, text: Tokens) -> int:
        """The text has become this one. Returns how many of its tokens are new."""
        common = min(len(text), len(self._text))
        if not np.array_equal(text[:common], self._seen[:common]):
            common = int(np.argmax(text[:common] != self._seen[:common]))
        if common < len(self._text):
            self._beside, self._parted, self._instead = -1, None, {}
        for token in reversed(self._text[common:]):
            self._places[token].pop()
        del self._text[common:]
        for token in text[common:].tolist():
            self._go_beside(token)
            self._places.setdefault(token, []).append(len(self._text))
            self._text.append(token)
        if len(self._seen) < len(text):
            self._seen = np.zeros(2 * len(text), np.intc)
            self._seen[: len(text)] = text
        self._seen[common : len(text)] = text[common:]
        return len(text) - common

    def _go_beside(self, token: int) -> None:
        """The text goes on with a token: so does the place that it corresponds to."""
        text, at = self._text, self._beside
        if at < 0:
            return
        if self._parted is None:
            if text[at] == token:
                self._instead = {
                    old: new for old, new in self._instead.items() if new[0] == token or not self._stands(old, at)
                }
                self._beside += 1
            else:
                self._parted = at, len(text)
            return
        before, began = self._parted
        n = len(text) - began  # tokens in place of others
        for skipped in sorted(range(1, _ASTRAY + 1), key=lambda skipped: abs(skipped - n)):
            if before + skipped < began and text[before + skipped] == token:
                old = tuple(text[before : before + skipped])
                self._instead = dict([*self._instead.items(), (old, tuple(text[began:]))][-_REMEMBERED:])
                self._beside, self._parted = before + skipped + 1, None
                return
        if n >= _ASTRAY:
            self._beside, self._parted = -1, None

    def guesses(self) -> Iterator[tuple[int, int]]:
        """Tokens that may come next, one after the other, and the kind of each."""
        matched, at = self._best()
        apart = 0 if self._parted is None else len(self._text) - self._parted[1]  # of them, it tells nothing
        if matched >= _CLEAR + apart:
            if self._beside != at:
                self._beside, self._parted = at, None
        elif self._beside >= 0:
            yield from self._aligned()
            return
        elif not matched:
            return
        for n, (token, replaced) in enumerate(self._going_on(at, [])):
            yield token, _REPLACED if replaced else bisect_right(_MATCHED, matched + n) - 1

    def _aligned(self) -> Iterator[tuple[int, int]]:
        """What stands where the text would be if tokens that are others ended here."""
        at, rest, kind = self._beside, tuple[int, ...](), _ALIGNED
        if self._parted is not None:
            before, began = self._parted
            said, kind = tuple(self._text[began:]), _FIRST_ALIGNED
            at = before + len(said)
            for old, new in self._instead.items():
                if self._stands(old, before) and new[: len(said)] == said:
                    at, rest, kind = before + len(old), new[len(said) :], _ALIGNED
        drafted = list(rest)
        yield from ((token, _REPLACED) for token in rest)
        for token, replaced in self._going_on(at, drafted):
            yield token, _REPLACED if replaced else kind
            kind = _ALIGNED

    def _going_on(self, at: int, drafted: list[int]) -> Iterator[tuple[int, bool]]:
        """The text from a place on, and what is drafted behind it; each token, and whether it takes others' place."""
        text = self._text
        while at < len(text) + len(drafted):
            old = next((old for old in self._instead if self._stands(old, at)), ())
            new = self._instead[old] if old else (text[at] if at < len(text) else drafted[at - len(text)],)
            at += len(old) or 1
            for token in new:
                drafted.append(token)
                yield token, bool(old)

    def _stands(self, tokens: tuple[int, ...], at: int) -> bool:
        return tuple(self._text[at : at + len(tokens)]) == tokens

    @staticmethod
    def is_match(kind: int) -> bool:
        """Whether a guess of this kind is behind a match; else it is behind a token that was another one."""
        return kind < len(_MATCHED)

    def _best(self) -> tuple[int, int]:
        """The longest match of the text's end, and where the text goes on behind it; of equal ones the latest."""
        text = self._text
        if not text:
            return 0, 0
        matched = at = 0
        last = len(text) - 1
        for place in reversed(self._places[text[-1]][-1 - _PLACES : -1]):
            n, most = 1, min(_LONGEST, place + 1)
            while n < most and text[place - n] == text[last - n]:
                n += 1
            if n > matched:
                matched, at = n, place + 1
                if n == _LONGEST:
                    break
        return matched, at

    def close(self) -> None:
        """Nothing is held."""
