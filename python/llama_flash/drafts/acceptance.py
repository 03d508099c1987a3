"""How likely a guess is taken, by what is known of it when it is made."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Acceptance"]

_WEIGHT = 3.0  # guesses that what is assumed beforehand counts for
_FADING = 0.98  # of what was seen, with each further guess of the kind


class Acceptance:
    """Chances of guesses, by kind: a small number, such as how much of the text before them has matched.

    Args:
        assumed: the chance of each kind before anything was seen.
    """

    def __init__(self, assumed: Sequence[float]) -> None:
        self._taken = [_WEIGHT * chance for chance in assumed]
        self._seen = [_WEIGHT for _ in assumed]
        self._mean = sum(assumed) / len(assumed)

    def chance(self, kind: int) -> float:
        """That a guess of this kind is taken if all before it are."""
        return self._taken[kind] / self._seen[kind]

    @property
    def mean(self) -> float:
        """Of the guesses lately made, whatever their kind."""
        return self._mean

    def add(self, kind: int, taken: bool) -> None:
        """A guess was checked. Those behind one that was not taken are not checked."""
        self._taken[kind] = _FADING * self._taken[kind] + taken
        self._seen[kind] = _FADING * self._seen[kind] + 1
        self._mean = _FADING * self._mean + (1 - _FADING) * taken
