"""Seconds of a pass over the weights by the number of tokens in it: assumed at first, then as they were."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Passes"]

_WIDEST = 15  # tokens beyond the first, for the slope's unit
_LEAST_WEIGHT = 0.1  # of a pass with one token, in the mean of those
_FADING = 0.97  # of what passes with several have shown, with each further one
_TRUST = 2.0  # passes that what is assumed counts for
_OUTLIER = 3.0  # times what is expected: somebody else had the machine


class Passes:
    """Of one model.

    What passes with several tokens take, in passes with one, is assumed to be off by a constant and a slope, which are
    fitted to those that were seen: no width needs to be tried by itself.

    Args:
        assumed: what a pass with so many tokens takes, in passes with one (1: one).
    """

    def __init__(self, assumed: Callable[[int], float]) -> None:
        self._assumed = assumed
        self.singles = 0  # passes with one token that were seen
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
        if n_tokens <= 1:
            return 1.0
        fitted = self._assumed(n_tokens) + self._offset + self._slope * (n_tokens - 1) / _WIDEST
        return max(0.8, fitted)

    def seconds(self, n_tokens: int) -> float:
        """Expected. 0: nothing was seen yet."""
        return (self._one or 0.0) * self.ratio(n_tokens)

    def add(self, n_tokens: int, seconds: float) -> None:
        """A pass has taken so long."""
        if self._one is None:
            self._one = seconds / self.ratio(n_tokens)
        if n_tokens == 1:
            self.singles += 1
            weight = max(_LEAST_WEIGHT, 1 / self.singles)
            self._one += weight * (
                min(seconds, _OUTLIER * self._one) - self._one if self.singles > 1 else seconds - self._one
            )
            return
        off = min(seconds / self._one, _OUTLIER * self.ratio(n_tokens)) - self._assumed(n_tokens)
        features = (1.0, (n_tokens - 1) / _WIDEST)
        for i in range(2):
            self._right[i] = _FADING * self._right[i] + features[i] * off
            for j in range(2):
                self._normal[i][j] = _FADING * self._normal[i][j] + features[i] * features[j]
            self._normal[i][i] += (1 - _FADING) * _TRUST
        (a, b), (_, d) = self._normal
        determinant = a * d - b * b
        self._offset = (d * self._right[0] - b * self._right[1]) / determinant
        self._slope = (a * self._right[1] - b * self._right[0]) / determinant
