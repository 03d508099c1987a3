"""Seconds of a pass over the weights by the number of tokens in it: assumed at first, then as they were."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Passes"]

_WIDEST = 15  # tokens beyond the first, for the slope's unit
_LEAST_WEIGHT = 0.1  # of a pass without a draft, in the mean of those
_FADING = 0.97  # of what passes with several have shown, with each further one
_LATER = 2.0  # times the weight of what is seen first: a cache may be cold then
_LESS = 0.9  # times what a pass without a draft is thought to take: it takes less
_TRUST = 2.0  # passes that what is assumed counts for
_OUTLIER = 3.0  # times what is expected: somebody else had the machine


class Passes:
    """Of one model.

    Those without a draft, which have a token of each text, say what a pass with one token takes: what is assumed for so
    many is taken to be right. What those with a draft take, in passes with one, is assumed to be off by a constant and
    a slope, fitted to those that were seen: no width needs to be tried by itself.

    Args:
        assumed: what a pass with so many tokens takes, in passes with one (1: one).
    """

    def __init__(self, assumed: Callable[[int], float]) -> None:
        self._assumed = assumed
        self._base = 1  # tokens of passes without a draft, lately
        self._plains = 0  # those that were seen since it is so
        self._one: float | None = None
        self._normal = [[_TRUST, 0.0], [0.0, _TRUST]]
        self._right = [0.0, 0.0]
        self._offset = self._slope = 0.0

    @property
    def known(self) -> bool:
        """Whether any pass was seen."""
        return self._one is not None

    def ratio(self, n_tokens: int) -> float:
        """What a pass with so many tokens takes, in passes with one."""
        if n_tokens <= self._base:
            return self._assumed(n_tokens) if n_tokens > 1 else 1.0
        fitted = self._assumed(n_tokens) + self._offset + self._slope * (n_tokens - self._base) / _WIDEST
        return max(0.8 * self._assumed(self._base), fitted)

    def seconds(self, n_tokens: int) -> float:
        """Expected. 0: nothing was seen yet."""
        return (self._one or 0.0) * self.ratio(n_tokens)

    def add(self, n_tokens: int, seconds: float, n_texts: int = 1) -> None:
        """A pass that went on with so many texts has taken so long."""
        if self._one is None:
            self._one = seconds / self.ratio(n_tokens)
        if n_tokens > n_texts:
            if seconds < _LESS * self.seconds(self._base):  # those with fewer take no longer
                self._note_one(seconds / self._assumed(n_tokens))
            self._fit(self._one, n_tokens, seconds)
            return
        if n_texts != self._base:
            self._base, self._plains = n_texts, min(self._plains, 1)
        self._note_one(seconds / self.ratio(n_texts))

    def _note_one(self, seconds: float) -> None:
        assert self._one is not None
        self._plains += 1
        if self._plains > 1:
            seconds = min(seconds, _OUTLIER * self._one)
        self._one += max(_LEAST_WEIGHT, min(1.0, _LATER / (self._plains + 1))) * (seconds - self._one)

    def _fit(self, one: float, n_tokens: int, seconds: float) -> None:
        off = min(seconds / one, _OUTLIER * self.ratio(n_tokens)) - self._assumed(n_tokens)
        features = (1.0, (n_tokens - self._base) / _WIDEST)
        for i in range(2):
            self._right[i] = _FADING * self._right[i] + features[i] * off
            for j in range(2):
                self._normal[i][j] = _FADING * self._normal[i][j] + features[i] * features[j]
            self._normal[i][i] += (1 - _FADING) * _TRUST
        (a, b), (_, d) = self._normal
        determinant = a * d - b * b
        self._offset = (d * self._right[0] - b * self._right[1]) / determinant
        self._slope = (a * self._right[1] - b * self._right[0]) / determinant
