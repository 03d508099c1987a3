"""How many tokens to draft: as many as make the most tokens per second, none where that is none.

SpecMemo's bound, step by step: a draft of k tokens gives 1 + sum of the chances that its first 1, 2, ... k are taken,
and takes the pass with k + 1 tokens and the time to draft them. Where several texts go on in one pass, their drafts
have the same length: what is missing of a text's is filled with tokens that are not expected to be right.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..planning.drafted import MOST_DRAFTED
from ..planning.lent import FEW_TOKENS
from .passes import Passes

__all__ = ["MOST", "Length"]

MOST = MOST_DRAFTED

_PLAIN = 8  # passes without drafts before one with, unless much is to be gained: a cache may be cold
_CERTAIN = 1.3  # times the tokens per second: much
_PROBE = 96  # passes with drafts, then one without: what that takes now
_AGAIN = 200  # passes without a draft, then one, if there is credit: whether it would pay by now
_CREDIT = 2.0  # passes without drafts that may be lost at first
_MOST_CREDIT = 10.0  # ... after drafts that paid
_EARNED = 0.01  # of the time: credit that comes by itself, and so the most that drafts that do not pay cost
_HOPELESS = 0.7  # times the tokens per second without: not tried even now and then


class Length:
    """`passes` is told the times by whoever makes them.

    Args:
        most: drafted tokens behind a text.
    """

    def __init__(self, passes: Passes, most: int = MOST) -> None:
        self._passes, self.most = passes, most
        self._per_guess = 0.0  # seconds to draft a token
        self._credit: float | None = None  # seconds
        self._plain = self._since_plain = self._since_draft = 0
        self._explores = False

    def begins(self, chance: float, n_texts: int = 1, idle: int = 0) -> bool:
        """Whether to draft in this step.

        Args:
            chance: of a guess, on average.
            idle: texts that have tokens in the pass without need: as many as each of the others.
        """
        self._explores = False
        if not self._passes.known or self._since_plain >= _PROBE or (self._credit or 0.0) < 0:
            return False
        without = n_texts / self._passes.seconds(n_texts + idle)
        gain = self._forecast(n_texts + idle, float(n_texts), 1.0, 0.0, chance, n_texts, idle) / without
        if self._plain < _PLAIN and gain < _CERTAIN:
            return False
        return gain > 1 or self._may_explore(gain, n_texts)

    def goes_on(self, width: int, expected: float, reach: float, spent: float, chance: float) -> bool:
        """Whether one more token is worth the time to draft it.

        Args:
            width, expected: of the pass with what is drafted.
            reach: chance that all of the draft is taken.
            spent: seconds of drafting so far.
            chance: of a guess, on average.
        """
        here = expected / (self._passes.seconds(width) + spent)
        return self._forecast(width, expected, reach, spent, chance) > here

    def took_to_guess(self, seconds: float) -> None:
        """A token was drafted in so many seconds."""
        self._per_guess += (seconds - self._per_guess) * (0.2 if self._per_guess else 1.0)

    def best(self, width: int, expected: float, chances: Sequence[float], spent: float) -> int:
        """How many of the guesses to check; chances: of each if all before it are taken."""
        passes, reach = self._passes, 1.0
        enough = _HOPELESS if self._explores else _CERTAIN if self._plain < _PLAIN else 1.0
        found, most = 0, enough * expected / passes.seconds(width)
        before = expected
        for n, chance in enumerate(chances[: self.most], 1):
            reach *= chance
            expected += reach
            rate = expected / (passes.seconds(width + n) + spent)
            if rate > most:
                found, most = n, rate
        if not found and not self._explores and chances and self._may_explore(_HOPELESS, width):
            return self.best(width, before, chances, spent)
        return found

    def common(
        self,
        chances: Sequence[Sequence[float]],
        spent: float,
        room: int,
        others: int = 0,
        idle: int = 0,
        *,
        fills: bool = False,
    ) -> int:
        """How many tokens to check behind each of several texts: of each the same number, up to `room`.

        A pass whose texts have as many tokens each reads the weights once; otherwise it is computed in steps, each of
        which reads them.

        Args:
            chances: of the guesses at each text; what a text's draft has more is never right.
            others: texts of the pass that have one token.
            idle: see begins.
            fills: the others are filled up to as many.
        """
        n_texts, passes = len(chances) + others, self._passes
        one = n_texts / passes.seconds(n_texts + idle)
        enough = _HOPELESS if self._explores else _CERTAIN if self._plain < _PLAIN else 1.0
        found, most, expected, reach = 0, enough * one, float(n_texts), [1.0] * len(chances)
        for n in range(1, room + 1):
            following = [each[n - 1] if n <= len(each) else 0.0 for each in chances]
            reach = [before * chance for before, chance in zip(reach, following, strict=True)]
            expected += sum(reach)
            seconds = passes.seconds((n_texts + idle) * (1 + n))
            if others and not fills:  # a token of each, then the drafts
                seconds = passes.seconds(n_texts) + passes.seconds(len(chances) * n)
            rate = expected / (seconds + spent)
            if rate > most:
                found, most = n, rate
        if not found and not self._explores and any(chances) and self._may_explore(_HOPELESS, n_texts):
            return self.common(chances, spent, room, others, idle, fills=fills)
        return found

    def checked(self, n_texts: int, n_drafted: int, n_tokens: int, seconds: float, spent: float, idle: int = 0) -> None:
        """A pass of so many seconds has checked so many drafted tokens, and given so many in all.

        Args:
            spent: seconds of drafting.
            idle: see begins.
        """
        one = self._passes.seconds(n_texts + idle)
        credit = _CREDIT * one if self._credit is None else self._credit
        if n_drafted:
            self._since_plain, self._since_draft = self._since_plain + 1, 0
            credit += n_tokens / n_texts * one - seconds - spent
        else:
            self._plain, self._since_plain, self._since_draft = self._plain + 1, 0, self._since_draft + 1
            credit -= spent
        self._credit = min(credit + _EARNED * seconds, _MOST_CREDIT * one)

    @property
    def has_credit(self) -> bool:
        """Whether anything may be lost."""
        return self._credit is None or self._credit >= 0

    def spent(self, seconds: float) -> None:
        """On drafts, besides what `checked` was told."""
        if self._credit is not None:
            self._credit -= seconds

    def _may_explore(self, gain: float, n_texts: int) -> bool:
        credit = self._credit or 0.0
        if gain < _HOPELESS or self._since_draft < _AGAIN or credit < _CREDIT * self._passes.seconds(n_texts):
            return False
        self._explores = True
        return True

    def _forecast(
        self, width: int, expected: float, reach: float, spent: float, chance: float, n_texts: int = 1, idle: int = 0
    ) -> float:
        """Tokens per second with the best number of further guesses behind each text, if they are as good as most."""
        best = 0.0
        for n in range(1, min(self.most, FEW_TOKENS // (n_texts + idle) - 1) + 1):
            reach *= chance
            expected += n_texts * reach
            spent += n_texts * self._per_guess
            best = max(best, expected / (self._passes.seconds(width + (n_texts + idle) * n) + spent))
        return best
