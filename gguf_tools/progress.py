"""Progress of long work: a bar with rate and remaining time on a terminal, a line now and then elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

_LINE_EVERY = 10.0  # seconds

Advance = Callable[[int], None]  # called with what was done since the last call


@contextmanager
def byte_progress(what: str | None, total: int) -> Iterator[Advance]:
    """Yields a function to call with the bytes done since the last call. what: None shows nothing."""
    with _shown(what, total, (DownloadColumn(), TransferSpeedColumn()), _bytes_line) as advance:
        yield advance


@contextmanager
def count_progress(what: str | None, total: int, unit: str) -> Iterator[Advance]:
    """The same for things that are counted; unit: what they are called, as "tokens"."""

    def line(done: int, rate: float) -> str:
        return f"{done} of {total} {unit}, {_rounded(rate)} {unit}/s"

    with _shown(
        what, total, (MofNCompleteColumn(), _Rate(unit)), lambda done, _total, rate: line(done, rate)
    ) as advance:
        yield advance


class _Rate(ProgressColumn):
    """Things per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("?" if speed is None else f"{_rounded(speed)} {self._unit}/s", style="progress.data.speed")


def _rounded(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def _bytes_line(done: int, total: int, rate: float) -> str:
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"


@contextmanager
def _shown(
    what: str | None,
    total: int,
    columns: tuple[ProgressColumn, ...],
    line: Callable[[int, int, float], str],
) -> Iterator[Advance]:
    console = Console(stderr=True)
    if what is None:
        yield lambda _n: None
    elif not console.is_terminal:
        yield _Lines(what, total, line)
    else:
        every = (TextColumn("{task.description}", markup=False), BarColumn(), *columns, TimeRemainingColumn())
        with Progress(*every, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda n: progress.advance(task, n)


class _Lines:
    """Says how far it is every ten seconds; what is done before that says nothing."""

    def __init__(self, what: str, total: int, line: Callable[[int, int, float], str]) -> None:
        self._what, self._total, self._line = what, total, line
        self._done = 0
        self._begun = self._said = time.monotonic()

    def __call__(self, n: int) -> None:
        self._done += n
        now = time.monotonic()
        if now < self._said + _LINE_EVERY or not self._done:
            return
        self._said = now
        rate = self._done / (now - self._begun)
        left = max(0, self._total - self._done) / rate
        print(
            f"{self._what}: {self._line(self._done, self._total, rate)}, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
