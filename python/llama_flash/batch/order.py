"""Requests of like length side by side: prompts that are computed together then take fewer steps.

Prompts of different lengths that begin together are computed in steps, each of which reads the weights
(session/steps.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

__all__ = ["by_length"]

_WINDOW = 8  # times as many requests as are computed together: neighbours in a file often begin with the same text

_T = TypeVar("_T")


def by_length(requests: Iterable[_T], length: Callable[[_T], int], parallel: int) -> Iterator[_T]:
    """All of them; of each run of 8 times `parallel` the shortest first. One by one they stay in their order."""
    if parallel == 1:  # nothing is computed together, and neighbours may begin with the same text
        yield from requests
        return
    rest = iter(requests)
    while window := list(islice(rest, _WINDOW * parallel)):
        yield from sorted(window, key=length)
