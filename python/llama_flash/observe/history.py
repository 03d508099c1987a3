"""What each of the last calls of the engine did: the plugin's counters after it, kept as they are.

Bounded, and cheap to add to: who draws or prints takes the differences.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from ..native import bindings
from .stats import Counters

__all__ = ["LIMIT", "Call", "History"]

LIMIT = 4096  # calls, some 400 bytes each


@dataclass(frozen=True)
class Call:
    """One llama_decode or llama_encode."""

    began: float  # seconds, of time.monotonic()
    ended: float
    counters: Counters  # of this call, and of what was read since the one before
    sequences: int = 1  # that had tokens in it

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def is_generation(self) -> bool:
        """One token of each sequence, as generation has it; else a prompt."""
        return self.counters.tokens == self.sequences


class History:
    """The last `limit` calls. One thread adds, any may ask."""

    def __init__(self, limit: int = LIMIT, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: float | None = None
        # (began, ended, tokens, sequences, bytes of a struct llama_flash_stats); the first one is what the next is
        # counted from
        self._ends: deque[tuple[float | None, float, int, int, bytes]] = deque(maxlen=limit + 1)

    def reset(self, raw: bindings.llama_flash_stats | None) -> None:
        """Forgets all calls; `raw`: the counters that the next one is counted from, None where nothing is counted."""
        self._ends.clear()
        self._ends.append((None, self._clock(), 0, 0, _bytes(raw)))

    def begin(self) -> None:
        self._began = self._clock()

    def end(self, n_tokens: int, raw: bindings.llama_flash_stats | None, n_sequences: int = 1) -> None:
        """A call has ended; raw: the counters after it, None where nothing is counted."""
        self._ends.append((self._began, self._clock(), n_tokens, n_sequences, _bytes(raw)))
        self._began = None

    def calls(self) -> list[Call]:
        """The oldest first."""
        ends = list(self._ends)
        found = []
        for before, (began, ended, n_tokens, n_sequences, raw) in pairwise(ends):
            counters = replace(_counters(raw) - _counters(before[4]), tokens=n_tokens, calls=1)
            # when it began was not noted: it took at least the time spent in flash operations
            began = max(before[1], ended - counters.op_seconds) if began is None else began
            found.append(Call(began, ended, counters, n_sequences))
        return found


def _bytes(raw: bindings.llama_flash_stats | None) -> bytes:
    return b"" if raw is None else bytes(raw)


def _counters(raw: bytes) -> Counters:
    return Counters.from_struct(bindings.llama_flash_stats.from_buffer_copy(raw)) if raw else Counters()
