"""An answer on a terminal while it is generated: its text, and below it one line of figures that leaves no trace."""

from __future__ import annotations

import time
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..budget.rooms import held_by_process
from ..observe.stats import Counters, FlashStats
from ..sizes import format_size

__all__ = ["AnswerView", "Meter"]


class Meter:
    """Figures of the answer that is being generated."""

    def __init__(self, session: Any) -> None:
        """session: `Llama.flash`."""
        self._session = session
        self._before: FlashStats = session.stats()
        self._started = time.perf_counter()
        self._first = self._last = 0.0

    def piece(self) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last

    @property
    def tokens(self) -> Counters:
        """Of the tokens generated since."""
        now: FlashStats = self._session.stats()
        return now.decode - self._before.decode

    @property
    def tokens_per_second(self) -> float | None:
        seconds = self._last - self._first
        return self.tokens.tokens / seconds if seconds > 0 else None

    @property
    def seconds_to_first_token(self) -> float | None:
        return self._first - self._started if self._first else None

    def line(self) -> str:
        """Speed, bytes per token, hit rate, memory."""
        now: FlashStats = self._session.stats()
        memory = f"{format_size(held_by_process())} of {format_size(now.budget.total)}"
        if not self._first:
            read = format_size(now.total.bytes_read - self._before.total.bytes_read)
            return f"reading the question, {time.perf_counter() - self._started:.0f} s, {read} from flash, {memory}"
        tokens, rate = self.tokens, self.tokens_per_second
        hits = "" if tokens.hit_rate is None else f", {tokens.hit_rate:.0%} found in memory"
        speed = "" if rate is None else f"{rate:.1f} tokens/s, "
        drafts = now.drafts.since(self._before.drafts)
        passes = f", {drafts.tokens_per_pass:.1f} tokens per pass" if drafts.drafts and drafts.tokens_per_pass else ""
        return f"{speed}{format_size(int(tokens.bytes_per_token))} read per token{passes}{hits}, {memory}"


class AnswerView:
    """Finished lines are printed for good; the last one and the figures below it are drawn anew as they grow."""

    def __init__(self, console: Console, meter: Meter) -> None:
        self._console, self._meter = console, meter
        self._open = ""  # the line that is not finished
        self._live = Live(console=console, transient=True, refresh_per_second=8, get_renderable=self._render)

    def __enter__(self) -> AnswerView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._open:
            self._print(self._open)
        self._console.print(Text(self._meter.line(), style="dim"), soft_wrap=True)

    def piece(self, text: str) -> None:
        """What was generated next."""
        *finished, rest = (self._open + text).split("\n")
        most = self._console.width * max(1, self._console.height // 2)
        while cell_len(rest) > most:  # more than can be drawn anew
            cut = rest.rfind(" ", 1, self._console.width * (self._console.height // 2)) + 1 or self._console.width
            finished.append(rest[:cut])
            rest = rest[cut:]
        self._open = rest
        for line in finished:
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(Text(_visible(line)), soft_wrap=True)

    def _render(self) -> RenderableType:
        status = Text(self._meter.line(), style="dim", no_wrap=True, overflow="ellipsis")
        return Group(Text(_visible(self._open), overflow="fold"), status) if self._open else status


def _visible(text: str) -> str:
    """A model may say anything, also what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
