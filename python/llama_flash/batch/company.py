"""When the prompts of a batch begin: in company, as prompts that begin together share the reading of weights.

A prompt that begins while others generate makes a step of its own. One that waits leaves a sequence idle. It waits
until the idle ones have cost as much as a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Company"]

_MOMENT = 0.02  # seconds without a new request: then no other one is on its way
_LOOK = 0.002


class Company:
    """A native.server.Holds, for so many sequences."""

    def __init__(self, parallel: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._parallel, self._clock = parallel, clock
        self._idle = 0.0  # passes of all sequences that idle ones would have been worth
        self._n_new, self._since = 0, 0.0

    def __call__(self, n_new: int, n_begun: int) -> bool:
        if n_begun:
            self._idle += n_new / self._parallel
            if self._idle < 1:
                return True
        elif n_new < self._parallel:  # all end at the same time: the next ones come one after the other
            if n_new != self._n_new:
                self._n_new, self._since = n_new, self._clock()
            if self._clock() - self._since < _MOMENT:
                time.sleep(_LOOK)
                return True
        self._idle, self._n_new = 0.0, 0
        return False
