"""Steps in which the engine computes a call of several sequences, and tokens computed for nothing to save some of them.

A step has sequences with consecutive numbers and as many tokens of each (llama.cpp: a micro-batch of a KV cache with a
stream for each sequence), and reads all weights. A sequence with fewer tokens than the others, or an idle one between
them, makes further steps. Filled up to their length it makes none; what was computed for the filling is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..observe.stats import StepStats
from ..planning.lent import FEW_TOKENS

__all__ = ["Beside", "Steps", "beside_drafts", "filled", "steps_of"]

_ASSUMED = 16.0  # tokens that take as long as a further step, before anything was seen
_MOST = 256.0
_FADING = 0.97  # of what calls have shown, with each further one
_ENOUGH = 12  # calls before they are believed
_PRICES = (1.0, 2.0, 4.0, 8.0, 16.0)  # of a token, where a batch has no room for what would be best


def steps_of(counts: Sequence[int], n_ubatch: int) -> list[int]:
    """Tokens of each step of a call in which sequence i has counts[i] tokens."""
    left, steps = list(counts), list[int]()
    while any(left):
        first = next(i for i, n in enumerate(left) if n)
        run = [first]
        while len(run) <= n_ubatch and run[-1] + 1 < len(left) and left[run[-1] + 1]:
            run.append(run[-1] + 1)
        each = min(min(left[i] for i in run), max(1, n_ubatch // len(run)))
        for i in run:
            left[i] -= each
        steps.append(each * len(run))
    return steps


def filled(counts: Sequence[int], n_ubatch: int, n_batch: int, per_step: float) -> list[int]:
    """How many tokens of each sequence to compute, so that the call takes least; never fewer than there are.

    Args:
        counts: tokens of each sequence.
        n_ubatch, n_batch: tokens of a step and of a call, at most.
        per_step: tokens that take as long to compute as a further step takes.
    """
    plain = len(steps_of(counts, n_ubatch)) * per_step + sum(counts)
    for price in _PRICES:
        found = _filled(counts, n_ubatch, per_step, price)
        if sum(found) <= n_batch:
            cost = len(steps_of(found, n_ubatch)) * per_step + sum(found)
            return found if cost < plain else list(counts)
    return list(counts)


def _filled(counts: Sequence[int], n_ubatch: int, per_step: float, price: float) -> list[int]:
    """The best way in which, of some lengths, each sequence is filled up to the next one.

    Sequences that go on beyond a length go on together: all from the first to the last of them, up to the next one.
    """
    lengths = sorted({0, *counts})
    spans = []
    for length in lengths[:-1]:
        longer = [i for i, n in enumerate(counts) if n > length]
        spans.append((longer[0], longer[-1] + 1))
    best, chosen = [0.0] * len(lengths), [0] * len(lengths)
    for a in reversed(range(len(lengths) - 1)):
        width = spans[a][1] - spans[a][0]
        each = max(1, n_ubatch // width)

        def cost(b: int, a: int = a, width: int = width, each: int = each) -> float:
            n = lengths[b] - lengths[a]
            return -(-n // each) * per_step + n * width * price + best[b]

        chosen[a] = min(range(a + 1, len(lengths)), key=cost)
        best[a] = cost(chosen[a])
    found, a = list(counts), 0
    while a < len(lengths) - 1:
        for i in range(*spans[a]):
            found[i] = lengths[chosen[a]]
        a = chosen[a]
    return found


class Steps:
    """Of one context of a model whose tokens all take the same weights.

    Args:
        n_ubatch, n_batch: of the context.
        few: tokens of a call that generates, at most: for more the memory of prompts is taken back from weights.
    """

    def __init__(self, n_ubatch: int, n_batch: int, few: int = 0) -> None:
        self._n_ubatch, self._n_batch, self._few = n_ubatch, n_batch, few
        self._normal, self._right = [[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]
        self._n_seen = self._n_steps = 0
        self._is_asked = False  # not where the engine could not remove what fills
        self.stats = StepStats()

    @property
    def per_step(self) -> float:
        """Tokens that take as long to compute as a further step takes, by the calls so far."""
        (a, b), (_, d) = self._normal
        determinant = a * d - b * b
        if self._n_seen < _ENOUGH or determinant <= 1e-6 * a * d:
            return _ASSUMED
        step = (d * self._right[0] - b * self._right[1]) / determinant
        token = (a * self._right[1] - b * self._right[0]) / determinant
        if token <= 0:
            return _MOST
        return min(_MOST, max(0.0, step / token))

    def in_one(self, counts: Sequence[int]) -> bool:
        """Whether a call in which sequence i has counts[i] tokens would be filled up to one step, if it is not one."""
        return self._is_asked and len(steps_of(self._filled(counts), self._n_ubatch)) == 1

    def _filled(self, counts: Sequence[int]) -> list[int]:
        most = min(self._few, self._n_batch) if sum(counts) <= self._few else self._n_batch
        return filled(counts, self._n_ubatch, most, self.per_step)

    def even(self, counts: Sequence[int]) -> list[int]:
        """As `filled`, for the call that begins."""
        found = self._filled(counts)
        self._is_asked = True
        self._n_steps = len(steps_of(found, self._n_ubatch))
        if found != list(counts):
            saved = len(steps_of(counts, self._n_ubatch)) - self._n_steps
            more = sum(found) - sum(counts)
            self.stats = StepStats(self.stats.filled + more, self.stats.saved + saved)
        return found

    def took(self, n_tokens: int, n_sequences: int, seconds: float) -> None:
        """A call has ended, of so many tokens, those for nothing included."""
        n_steps = self._n_steps or len(steps_of([-(-n_tokens // n_sequences)] * n_sequences, self._n_ubatch))
        self._n_steps = 0
        if seconds <= 0:
            return
        # fitted is what a step and a token take, each call by its share
        row = (n_steps / seconds, n_tokens / seconds)
        for i in range(2):
            self._right[i] = _FADING * self._right[i] + row[i]
            for j in range(2):
                self._normal[i][j] = _FADING * self._normal[i][j] + row[i] * row[j]
        self._n_seen += 1


class Beside(NamedTuple):
    """What a pass has beside the texts that have drafts in it: see drafts.drafter.Drafter.draft."""

    others: int = 0
    idle: int = 0
    fills: bool = False
    prompts: int = 0


def beside_drafts(
    steps: Steps | None, n_generating: int, texts: Sequence[int], prompts: Sequence[tuple[int, int]]
) -> Beside:
    """What the next pass has beside drafts.

    A prompt of which one token is left is a text that goes on with one token: a longer draft makes a step of its own,
    unless it is filled up. One that is longer is another step with drafts and without them.

    Args:
        steps: None: nothing is filled up.
        n_generating: sequences that go on.
        texts: those of them that may have drafts.
        prompts: sequences of which a part of the prompt is computed, and how many tokens are left of it.
    """
    others, n_prompts = n_generating - len(texts), sum(n for _, n in prompts)
    if not texts or n_generating + n_prompts > FEW_TOKENS:
        return Beside(others)  # the memory of prompts is in use
    if any(n > 1 for _, n in prompts):
        return Beside(others, prompts=n_prompts)
    if steps is None or others:
        return Beside(others + len(prompts))
    rows = [*texts, *(sequence for sequence, _ in prompts)]
    n_rows = max(rows) - min(rows) + 1
    plain = [int(i in rows) for i in range(max(rows) + 1)]
    idle = n_rows - len(rows) if steps.in_one(plain) else 0
    drafted = [max(2, FEW_TOKENS // n_rows) if i in texts else n for i, n in enumerate(plain)]
    return Beside(len(prompts), idle, bool(prompts) and steps.in_one(drafted))
