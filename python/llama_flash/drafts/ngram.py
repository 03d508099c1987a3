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
_ASSUMED = (0.15, 0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.9, 0.5, 0.75)
_FIRST_ALIGNED, _ALIGNED = 8, 9  # kinds: behind a token that was another one
_CLEAR = 3  # tokens that have matched: clearer than where the text was before
_ASTRAY = 4  # tokens behind the last match in which the text may be where it was


class TextDraft:
    """Of one text at a time. A guess's kind is how many tokens before it were the same, those of the draft included."""

    name = "ngram"
    assumed: Sequence[float] = _ASSUMED

    def __init__(self) -> None:
        self._text: list[int] = []
        self._seen: Tokens = np.zeros(0, np.intc)
        self._places: dict[int, list[int]] = {}  # of each token, in the order of the text
        self._beside = 0  # place that the text's end corresponds to, if one token took the place of another
        self._astray = _ASTRAY  # tokens since that was seen

    def follow(self, text: Tokens) -> int:
        """The text has become this one. Returns how many of its tokens are new."""
        common = min(len(text), len(self._text))
        if not np.array_equal(text[:common], self._seen[:common]):
            common = int(np.argmax(text[:common] != self._seen[:common]))
        if common == len(self._text):
            self._beside += len(text) - common
            self._astray += 1
        else:
            self._astray = _ASTRAY
        for token in reversed(self._text[common:]):
            self._places[token].pop()
        del self._text[common:]
        for token in text[common:].tolist():
            self._places.setdefault(token, []).append(len(self._text))
            self._text.append(token)
        if len(self._seen) < len(text):
            self._seen = np.zeros(2 * len(text), np.intc)
            self._seen[: len(text)] = text
        self._seen[common : len(text)] = text[common:]
        return len(text) - common

    def guesses(self) -> Iterator[tuple[int, int]]:
        """Tokens that may come next, one after the other, and the kind of each."""
        matched, at = self._best()
        aligned = matched < _CLEAR and self._astray < _ASTRAY
        if aligned:
            at = self._beside
        elif not matched:
            return
        elif matched >= _CLEAR:
            self._beside, self._astray = at, 0
        text, drafted = self._text, list[int]()
        while True:
            n = len(text) - at
            token = text[at + len(drafted)] if len(drafted) < n else drafted[len(drafted) - n]
            if aligned:
                yield token, _ALIGNED if drafted else _FIRST_ALIGNED
            else:
                yield token, bisect_right(_MATCHED, matched + len(drafted)) - 1
            drafted.append(token)

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
