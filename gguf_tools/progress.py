"""Progress of long writes: a bar with rate and remaining time on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LINE_EVERY = 10.0  # seconds


@contextmanager
def byte_progress(what: str | None, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes done since the last call. Shown on stderr; None: nothing is shown."""
    console = Console(stderr=True)
    if what is None:
        yield lambda _n_bytes: None
    elif not console.is_terminal:
        yield _Lines(what, total)
    else:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda n_bytes: progress.advance(task, n_bytes)


class _Lines:
    """Says how far it is every ten seconds; what is done before that says nothing."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._done = 0
        self._begun = self._said = time.monotonic()

    def __call__(self, n_bytes: int) -> None:
        self._done += n_bytes
        now = time.monotonic()
        if now < self._said + _LINE_EVERY or not self._done:
            return
        self._said = now
        rate = self._done / (now - self._begun)
        print(
            f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, "
            f"{max(0, self._total - self._done) / rate:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
