"""`llama-flash top`: the running processes with weights on flash, as a table that renews itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..budget import status
from ..budget.cores import explain_throttling
from ..sizes import format_size

__all__ = ["Rates", "show", "table"]


class Rates:
    """Tokens per second of each model: from what two looks say. Keeps the last one that is known."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, str], tuple[float, int]] = {}
        self._rate: dict[tuple[int, str], float] = {}

    def of(self, process: dict[str, Any], which: int) -> float | None:
        """Tokens per second of the process' model number `which`, None while there has been one look only."""
        model = process["models"][which]
        key = (int(process["pid"]), f"{which} {model['path']}")
        now, tokens = float(process["written"]), int(model["total"]["tokens"])
        before = self._before.get(key)
        if before is None or now > before[0]:
            self._before[key] = (now, tokens)
            if before is not None:
                self._rate[key] = max(0, tokens - before[1]) / (now - before[0])
        return self._rate.get(key)


def table(processes: list[dict[str, Any]], rates: Rates) -> RenderableType:
    """The processes, a row for each model."""
    if not processes:
        return Text(f"no process with weights on flash is running (looked in {status.folder()})")
    result = Table(box=None, header_style="bold", pad_edge=False)
    result.add_column("PID", no_wrap=True)
    result.add_column("MODEL", no_wrap=True, overflow="ellipsis", max_width=32)
    for name in ("TOK/S", "HITS", "B/TOKEN", "FLASH MEMORY", "PROCESS", "MAY TAKE", "PRESSURE"):
        result.add_column(name, justify="right", no_wrap=True)
    for process in processes:
        held = f"{format_size(process['held'])}"
        for i, model in enumerate(process["models"]):
            rate, hit = rates.of(process, i), model["decode"].get("hit_rate")
            result.add_row(
                "" if i else str(process["pid"]),
                Text(Path(model["path"]).name),
                "-" if rate is None else f"{rate:.1f}",
                "-" if hit is None else f"{hit:.1%}",
                format_size(int(model["decode"]["bytes_per_token"])),
                f"{format_size(model['slots_in_use'])} of {format_size(model['granted'])}",
                "" if i else held,
                "" if i else format_size(process["room"]),
                "" if i else _ago(process.get("pressure")),
            )
    return Group(result, *(hint for process in processes for hint in _throttled(process)))


def _throttled(process: dict[str, Any]) -> list[Text]:
    """What a CPU quota has done to it, and what to do."""
    stopped = max((model.get("throttled", 0), model.get("throttled_seconds", 0.0)) for model in process["models"])
    return [Text(f"{process['pid']}: {explain_throttling(*stopped)}", style="yellow")] if stopped[0] else []


def _ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.0f} s ago"


def show(once: bool, seconds: float) -> None:
    """Prints the table; renews it until Ctrl-C, on a terminal."""
    console, rates = Console(), Rates()
    if once or not console.is_terminal:
        console = console if console.is_terminal else Console(width=160)
        console.print(table(status.read_all(), rates))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            hint = Text("Ctrl-C ends", style="dim")
            live.update(Group(table(status.read_all(), rates), Text(), hint), refresh=True)
            time.sleep(seconds)
