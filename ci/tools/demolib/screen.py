"""What is seen of the demo: its parts, and what is going on, with the time it has taken so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Screen:
    def __init__(self, parts: int) -> None:
        """parts: how many there will be."""
        self.console = Console(highlight=False)
        self._parts = parts
        self._part = 0

    def part(self, title: str, about: str) -> None:
        """Begins the next part. about: what is going to be seen."""
        self._part += 1
        self.console.print()
        self.console.rule(f"{self._part} of {self._parts}: {title}", align="left", characters="-")
        self.console.print(about)

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def show(self, what: RenderableType) -> None:
        self.console.print(Padding(what, (1, 0)))

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """While it lasts; a line where the output is not a terminal."""
        if not self.console.is_terminal:
            self.say(f"{doing} ...")
            yield
            return
        columns = (SpinnerColumn("line"), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            progress.add_task(doing, total=None)
            yield

    def error(self, text: str) -> None:
        Console(stderr=True, highlight=False).print(f"error: {text}", style="red", markup=False, soft_wrap=True)
