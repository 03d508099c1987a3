"""Several sequences at the same time: what they get, each and in all, and how many are worth having."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cost import Cost
from .lent import FEW_TOKENS

__all__ = ["Together", "advised", "counts"]

_WORTH = 1.10  # times the tokens per second, for twice the sequences


@dataclass(frozen=True)
class Together:
    """So many sequences that generate at the same time."""

    sequences: int
    cost: Cost  # of a pass, which has a token of each

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences."""
        return self.cost.tokens_per_second

    @property
    def tokens_per_second_each(self) -> float:
        return self.cost.tokens_per_second / self.sequences

    @property
    def bytes_per_token(self) -> float:
        """From flash."""
        return self.cost.bytes_per_token

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("sequences", "tokens_per_second", "tokens_per_second_each", "bytes_per_token")
        return {name: getattr(self, name) for name in names}


def counts(parallel: int, most: int = FEW_TOKENS) -> list[int]:
    """Numbers of sequences to compare: powers of two up to `most`, and `parallel`."""
    powers = [1 << i for i in range(most.bit_length())]
    return sorted({*powers, parallel})


def advised(options: Sequence[Together]) -> int:
    """The most sequences of which each doubling brought at least a tenth more tokens per second.

    options: those that have room, by number of sequences, one first.
    """
    doublings = [option for option in options if option.sequences & (option.sequences - 1) == 0]
    best = doublings[0]
    for option in doublings[1:]:
        if option.tokens_per_second < _WORTH * best.tokens_per_second:
            break
        best = option
    return best.sequences
