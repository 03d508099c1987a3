"""Tables of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchlib.bookkeeping import Count
from benchlib.limits import Limit
from benchlib.measure import FLASH, Outcome
from benchlib.runs import Setting

_COLUMNS = (
    *("mode", "tok/s", "load", "CPU per token", "read per token", "hit rate", "peak memory", "speed-up over naive"),
    "spread",
)


def outcome_table(outcome: Outcome) -> Table:
    """tok/s, load, CPU time and bytes read per token, peak memory and speed-up of each setting."""
    cap = f"cap {outcome.cap / 1e9:.2f} of {outcome.model_bytes / 1e9:.2f} GB"
    title = f"{outcome.case.model.title}: {outcome.case.work}, {cap}"
    table = Table(title=title, title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "mode" else "right")
    naive = outcome.naive
    base = outcome.median(naive) if naive else None
    for setting in sorted(
        outcome.settings(), key=lambda s: ("naive", "flash", "single", "cached", "resident").index(s.mode)
    ):
        table.add_row(*_cells(outcome, setting, base))
    if (limit := outcome.limit()) and (speed := outcome.median(FLASH)):
        table.caption, table.caption_justify = _caption(outcome, limit, speed), "left"
    return table


def _caption(outcome: Outcome, limit: Limit, speed: float) -> str:
    rate = outcome.rates[0]
    said = (
        f"limit {limit.tok_s:.2f} tok/s, by {limit.bound_by}: flash {limit.flash * 1e3:.1f} ms (raw reads of "
        f"{rate.chunk >> 10} KiB, {rate.depth} in flight: {rate.bytes_per_second / 1e9:.2f} GB/s), computing "
        f"{limit.computing * 1e3:.1f} ms; reached: {speed / limit.tok_s:.2f}"
    )
    if kernel := outcome.median(FLASH, "system_seconds_per_token"):
        said += f"; in the kernel {kernel * 1e3:.2f} ms of CPU time per token, {kernel * speed:.1%} of it"
    if (outside := outcome.cpu_outside_kernels()) is not None:
        said += (
            f"; outside the arithmetic's kernels {outside * 1e3:.1f} ms of CPU time per token by the engine's counters"
        )
    if (more := outcome.cpu_over_resident()) is not None:
        said += f"; {more * 1e3:.1f} ms more than resident's"
    if together := outcome.median(FLASH, "tokens_per_pass"):
        said += f"; {together:.1f} tokens per pass"
    return said


def _cells(outcome: Outcome, setting: Setting, base: float | None) -> list[str]:
    runs = outcome.of(setting)
    speed = outcome.median(setting)
    read = outcome.median(setting, "device_bytes_per_token")
    hits = outcome.median(setting, "hit_rate")
    load, cpu = outcome.median(setting, "load_seconds"), outcome.cpu_seconds(setting)
    peak = max(run.peak for run in runs)
    uncapped = " (no cap)" if setting.mode in ("cached", "resident") else ""
    if speed is None and outcome.case.work == "first" and any(run.ok for run in runs):
        speed_cell = f"first token after {outcome.first_token_of(setting):.2f} s"
    elif speed is None:
        speed_cell = "OOM-killed" if any(run.oom_killed for run in runs) else "failed"
    else:
        speed_cell = f"{speed:.2f}"
    return [
        setting.name,
        speed_cell,
        "-" if load is None else f"{load:.1f} s",
        "-" if cpu is None else f"{cpu * 1e3:.1f} ms",
        "-" if read is None else f"{read / 1e6:.1f} MB",
        "-" if hits is None else f"{hits:.1%}",
        f"{peak / 1e9:.2f} GB{uncapped}",
        f"{speed / base:.2f} x" if speed and base else "-",
        "-" if (spread := outcome.spread(setting)) is None else f"{spread:.0%}",
    ]


def verdict_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="Reached?", title_justify="left")
    table.add_column("case")
    table.add_column("measured")
    table.add_column("")
    for outcome in outcomes:
        for what, reached in outcome.verdicts():
            table.add_row(outcome.case.name, what, "[green]yes[/]" if reached else "[red]no[/]")
    return table


def bookkeeping_table(counts: dict[str, Count]) -> Table:
    title = "Instructions of the cache's bookkeeping, counted by callgrind"
    table = Table(title=title, title_justify="left")
    for column in ("model", "per token", "per record used", "misses per token"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, count in counts.items():
        table.add_row(name, f"{count.per_token:.0f}", f"{count.per_use:.0f}", f"{count.misses:.0f}")
    return table


def machine_table(description: dict[str, Any], rates: dict[str, float]) -> Table:
    table = Table(title="Machine", title_justify="left", show_header=False)
    for key, value in description.items():
        table.add_row(key, str(value))
    for key, rate in rates.items():
        table.add_row(key, f"{rate / 1e9:.2f} GB/s")
    return table


def print_failures(console: Console, outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        for run in outcome.runs:
            if not run.ok:
                console.print(f"[red]{outcome.case.name}, {run.setting.name}:[/] {run.error}", highlight=False)
