"""What the calls of the engine have done: counters by kind of call, and the last calls one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..budget.cores import Throttling
from ..budget.rooms import Breakdown, Budget
from ..native.handle import Session
from ..native.library import IO_ENGINES
from ..observe.history import History
from ..observe.stats import Counters, DraftStats, FlashStats, PromptStats, StepStats
from ..planning.placed import Plan

__all__ = ["Account"]

_IO_NAMES = {int(number): name for name, number in IO_ENGINES.items()}
_NONE = Counters()


@dataclass(frozen=True)
class _Progress:
    """What the calls so far have done; replaced as a whole, so that another thread may read it."""

    seen: Counters = _NONE  # the plugin's counters after the last call
    prompt: Counters = _NONE
    decode: Counters = _NONE
    last: Counters = _NONE


class Account:
    """Of one model. One thread adds, any may ask."""

    def __init__(self) -> None:
        self.plan: Plan  # as soon as there is one
        self.predictor = "none"  # how active neurons are found
        self.history = History()  # of the last calls
        self.drafts: Callable[[], DraftStats] = DraftStats
        self.prompts: Callable[[], PromptStats] = PromptStats
        self.steps: Callable[[], StepStats] = StepStats
        self.history.reset(None)
        self._throttling = Throttling()
        self._progress = _Progress()
        self._final: FlashStats | None = None

    @property
    def decode(self) -> Counters:
        """Of the calls with one token of each sequence."""
        return self._progress.decode

    def begin(self, native: Session) -> None:
        """Counts from here on."""
        raw = native.stats()
        self._progress = _Progress(seen=Counters.from_struct(raw))
        self.history.reset(raw)

    def add(self, n_tokens: int, native: Session | None, n_sequences: int = 1, drafted: int = 0) -> None:
        """A call of so many tokens has ended: one of each sequence is generation, more of any is a prompt.

        drafted: tokens of them that are guesses. They count when they are `accepted`.
        """
        before = self._progress
        raw = None if native is None else native.stats()
        self.history.end(n_tokens, raw, n_sequences)
        seen = before.seen if raw is None else Counters.from_struct(raw)
        last = replace(seen - before.seen, tokens=n_tokens - drafted, calls=1)
        if n_tokens - drafted == n_sequences:
            self._progress = _Progress(seen, before.prompt, before.decode + last, last)
        else:
            self._progress = _Progress(seen, before.prompt + last, before.decode, last)

    def accepted(self, n_tokens: int) -> None:
        """Of the tokens that were drafted for the last call, so many are what the model says."""
        more = Counters(tokens=n_tokens)
        progress = self._progress
        self._progress = replace(progress, decode=progress.decode + more, last=progress.last + more)

    def stats(self, budget: Budget, memory: Breakdown, native: Session | None) -> FlashStats:
        if self._final is not None:
            return self._final
        progress = self._progress
        now, in_use, io_engine, ahead = progress.seen, 0, "none", 0
        if native is not None and not native.forked:
            raw = native.stats()
            now, in_use, io_engine = Counters.from_struct(raw), raw.resident_bytes, _IO_NAMES.get(raw.io_engine, "?")
            ahead = raw.reads_ahead
        done = progress.prompt + progress.decode
        throttled, throttled_seconds = self._throttling.since()
        return FlashStats(
            mode=self.plan.mode,
            predictor=self.predictor,
            io_engine=io_engine,
            budget=budget,
            memory=memory,
            slots_in_use=in_use,
            resident_weights=self.plan.resident_bytes,
            flash_weights=self.plan.flash_bytes,
            n_neurons=self.plan.n_neurons,
            reads_ahead=ahead,
            total=replace(now, tokens=done.tokens, calls=done.calls),
            prompt=progress.prompt,
            decode=progress.decode,
            last=progress.last,
            throttled=throttled,
            throttled_seconds=throttled_seconds,
            drafts=self.drafts(),
            prompts=self.prompts(),
            steps=self.steps(),
        )

    def finish(self, budget: Budget, memory: Breakdown, native: Session) -> None:
        """The last numbers, for `stats` to answer with from now on."""
        self._final = self.stats(budget, memory, native)
