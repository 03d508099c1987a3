"""The large model, run in three ways: in too little memory without and with flash offload, and with all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchlib import machine
from benchlib.measure import FLASH, RESIDENT, naive_settings
from benchlib.runs import Run, Setting, run
from rich.table import Table

import llama_flash
from demolib.screen import Screen
from llama_flash.budget.rooms import resolve_budget

_STOCK, _OURS = "stock llama.cpp", "flash offload"
_CTX, _UBATCH = 256, 64
_TOKENS = {"warm_up": 96, "tokens": 128, "min_tokens": 2}
_PATIENCE, _TIMEOUT = 3.0, 120.0  # seconds: for the machine to be idle, and for a run
_SAME = 0.9  # share of the answers: what other rounding changes is less, and a fault more
_BUSY = 0.5  # CPUs that others use, from which on figures suffer
_REPACKED = 1.15  # memory of a run with all of it, as a share of the model; beside the interpreter


@dataclass(frozen=True)
class Comparison:
    """The fastest run of each way; None where it was left out."""

    model_bytes: int
    limit: int  # bytes of memory
    naive: Run | None
    flash: Run
    resident: Run | None

    @property
    def ok(self) -> bool:
        """Whether flash offload worked, and what it was compared with that always does."""
        runs = [run for run in (self.flash, self.resident) if run]
        same = self.same(self.flash)
        return all(run.ok for run in runs) and (same is None or same >= _SAME)

    def same(self, run: Run | None) -> float | None:
        """Share of the tokens that were answered as with all memory. None where that is not known.

        Logits are the same to the bit where the weights' layout in memory is. Where it is not, sums are rounded
        otherwise, and now and then a token that comes close to another one takes its place.
        """
        if not run or not self.resident or run is self.resident or not (run.ok and self.resident.ok):
            return None
        pairs = list(zip(run.measured["answers"], self.resident.measured["answers"], strict=False))
        return float(np.mean([answer == expected for answer, expected in pairs]))

    def table(self) -> Table:
        table = Table(title_justify="left")
        table.add_column("what ran")
        for column in ("memory\nallowed", "tokens\nper second", "read from disk\nper token"):
            table.add_column(column, justify="right")
        table.add_column("same answers as\nwith all memory")
        limit = f"{self.limit / 1e9:.2f} GB"
        for name, memory, result in (
            (_STOCK, limit, self.naive),
            (_OURS, limit, self.flash),
            (_STOCK, "no limit", self.resident),
        ):
            if result:
                table.add_row(name, memory, *_figures(result), _answers(self.same(result)), style=_style(name))
        return table

    def meaning(self) -> str:
        """One line on what the table says."""
        sizes = f"a model of {self.model_bytes / 1e9:.2f} GB in {self.limit / 1e9:.2f} GB of memory"
        if not self.flash.ok:
            return f"Flash offload failed to run {sizes}."
        if self.naive and self.naive.ok:
            faster = f"ran {self.flash.tok_s / self.naive.tok_s:.1f} times as fast as stock llama.cpp"
        elif self.resident and self.resident.ok:
            faster = f"ran at {self.flash.tok_s / self.resident.tok_s:.0%} of the speed that all memory gives"
        else:
            faster = "ran"
        same = self.same(self.flash)
        answers = "" if same is None else ", with the same answers" if same >= _SAME else ", with OTHER ANSWERS"
        return f"{sizes[0].upper()}{sizes[1:]}: with flash offload it {faster}{answers}."

    def notes(self) -> Iterator[str]:
        """What else a reader of the table may ask."""
        if self.naive and _SAME <= (self.same(self.naive) or 0.0) < 1.0:
            yield "Under a limit stock llama.cpp leaves weights as they are in the file, and rounds otherwise."

    def failures(self) -> Iterator[str]:
        for name, result in ((_STOCK, self.naive), (_OURS, self.flash), (f"{_STOCK}, no limit", self.resident)):
            if result and not result.ok:
                yield f"{name}: {result.error}"


def compare(screen: Screen, model: Path, *, seconds: float, no_limit: str) -> Comparison:
    """seconds: for which a run warms up, and again is measured, at most. no_limit: why memory cannot be limited."""
    size = model.stat().st_size
    smallest = llama_flash.plan(model, n_ctx=_CTX, n_batch=_UBATCH, n_ubatch=_UBATCH).smallest
    limit = max(size // 2, int(smallest * 1.1))
    shape = {"n_ctx": _CTX, "n_ubatch": _UBATCH}
    spec: dict[str, Any] = {"work": "decode", "answers": True, "max_seconds": seconds, **shape, **_TOKENS}
    machine.wait_until_idle(_BUSY, _PATIENCE)
    naive = None
    if no_limit:
        screen.say(f"Left out, {_STOCK} in {limit / 1e9:.2f} GB: {no_limit}", "yellow")
    else:
        settings = naive_settings(model)
        if len(settings) == 1 and machine.readahead_kb(model) != machine.LINUX_READAHEAD_KB:
            screen.say("Left out, a second readahead setting: it cannot be set here", "yellow")
        naive = _best(screen, _STOCK, settings, model, limit, spec)
    # where the kernel keeps no limit, flash offload keeps its own
    own = {"flash": {"dram_budget": limit}} if no_limit else {}
    flash = _best(screen, _OURS, [FLASH], model, limit, spec | own, enforced=not no_limit)
    resident = None
    if resolve_budget("auto", None, model_bytes=size).total < size * _REPACKED:
        screen.say(f"Left out, {_STOCK} with all memory: there is not enough free", "yellow")
    else:
        resident = _best(screen, _STOCK, [RESIDENT], model, None, spec)
    busy = max(run.other_cpus for run in (naive, flash, resident) if run)
    if busy > _BUSY:
        screen.say(f"Other programs kept {busy:.1f} CPUs busy: the figures suffer from it", "yellow")
    return Comparison(size, limit, naive, flash, resident)


def _best(
    screen: Screen,
    name: str,
    settings: Sequence[Setting],
    model: Path,
    limit: int | None,
    spec: dict[str, Any],
    *,
    enforced: bool = True,
) -> Run:
    memory = "no memory limit" if limit is None else f"{limit / 1e9:.2f} GB of memory"
    results = []
    for setting in settings:
        which = "" if setting.readahead_kb is None else f", readahead {setting.readahead_kb} KiB"
        title = f"{name}, {memory}{which}"
        with screen.busy(title):
            result = run(setting, model, limit if enforced else None, patience=0.0, timeout=_TIMEOUT, **spec)
        screen.say(f"{title}: {_figures(result)[0]}{' tokens per second' if result.ok else ''}")
        results.append(result)
    return max(results, key=lambda result: result.tok_s)


def _figures(result: Run) -> tuple[str, str]:
    """Tokens per second, and what was read for each."""
    if not result.ok:
        return ("out of memory" if result.oom_killed else "failed"), "-"
    read = result.bytes_per_token / 1e6
    return f"{result.tok_s:.1f}", f"{read:.0f} MB" if read >= 0.5 else "nothing"


def _answers(same: float | None) -> str:
    return "-" if same is None else "yes" if same == 1.0 else "no" if same < _SAME else f"{same:.1%}"


def _style(name: str) -> str:
    return "bold green" if name == _OURS else ""
