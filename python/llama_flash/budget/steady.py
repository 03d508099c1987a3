"""How what a process takes beside flash memory moves while its models decode: twice that is left unused then."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

__all__ = ["Steady"]

_WINDOW = 60.0  # seconds that are looked back
_LEAST_SECONDS, _LEAST_LOOKS = 1.0, 3  # without as much, nothing is known
_SETTLES = 0.5  # seconds in which the first tokens touch what all of them need


class Steady:
    """Of one process. Begins anew whenever a model does something else than decode."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()  # (seconds, bytes)
        self._began: float | None = None

    def look(self, now: float, taken: int, decoding: bool) -> int | None:
        """The most bytes that were taken from one look to the next; None: not known yet, or not decoding.

        Args:
            taken: bytes below the limit, by this process beside flash memory and by its neighbours.
            decoding: whether all models decode.
        """
        if not decoding:
            self._seen.clear()
            self._began = None
            return None
        if self._began is None:
            self._began = now
        if now - self._began < _SETTLES:
            return None
        self._seen.append((now, taken))
        while self._seen[0][0] < now - _WINDOW:
            self._seen.popleft()
        if len(self._seen) < _LEAST_LOOKS or now - self._seen[0][0] < _LEAST_SECONDS:
            return None
        return max(0, *(after - before for (_, before), (_, after) in pairwise(self._seen)))
