"""Tables 2 and 3: one run per rung of the ladder from naive to bundling, at the same memory cap."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchlib.measure import RESIDENT, naive_settings
from benchlib.runs import Run, Setting, run

from reproducelib.models import File, ReproducedModel
from reproducelib.rates import Rates, rate_of


@dataclass(frozen=True)
class Rung:
    name: str  # as in paper.TABLE_2
    title: str
    file: File
    flash: dict[str, Any] | None  # options of FlashOffload; None: stock
    capped: bool = True


def rungs(window: int | None) -> tuple[Rung, ...]:
    """window: previous tokens whose neurons are kept; None: as many as have room.

    The paper's rungs read what a layer needs when it needs it; the last two lay co-active neurons side by side, and
    read ahead.
    """
    sparse = {"predictor": "lowrank", "window": window, "lookahead": False}
    return (
        Rung("resident", "no cap", "plain", None, capped=False),
        Rung("naive", "naive", "plain", None),
        Rung("hybrid", "hybrid", "bundled", {"predictor": "off"}),
        Rung("predictor", "+ predictor", "split", sparse | {"window": 0}),
        Rung("window", "+ window", "split", sparse),
        Rung("bundling", "+ bundling", "bundled", sparse),
        Rung("reordered", "+ reordering", "reordered", sparse),
        Rung("ahead", "+ reading ahead", "reordered", sparse | {"lookahead": True}),
    )


@dataclass
class RungOutcome:
    rung: Rung
    runs: list[Run] = field(default_factory=list)

    @property
    def chosen(self) -> list[Run]:
        """The runs that count: those of the better readahead setting."""
        return max(self._by_setting(), key=lambda runs: _median([run.tok_s for run in runs if run.ok]) or 0.0)

    def _by_setting(self) -> list[list[Run]]:
        settings = dict.fromkeys(run.setting for run in self.runs)
        return [[run for run in self.runs if run.setting == setting] for setting in settings]

    def median(self, figure: Callable[[Run], float | None]) -> float | None:
        """Over the runs that finished; None where none did."""
        return _median([figure(run) for run in self.chosen if run.ok])


@dataclass(frozen=True)
class Row:
    """What tables 2 and 3 say about a rung. Per token; bytes and seconds. None: not known, or no run finished."""

    rung: Rung
    dram: float | None  # peak of the cgroup, page cache included
    tok_s: float | None
    total: float | None
    read: float | None
    reads: float | None
    rate: float | None  # bytes per second: flash, of the raw device for reads of this mean size; naive, as measured
    io: float | None  # reading, if nothing were computed meanwhile
    waited: float | None  # by the computing threads, for reads
    memory: float | None  # memory management
    compute: float | None  # the rest
    predict: float | None  # part of compute
    newly_active: float | None  # neurons, as a share of all
    hit_rate: float | None
    error: str


def climb(
    model: ReproducedModel,
    share: float,
    repeats: int,
    window: int | None,
    stream: Path,
    spec: dict[str, Any],
    report: Callable[[str], None],
    *,
    together: bool,
    keep: bool,
    only: Sequence[str] = (),
) -> list[RungOutcome]:
    """Measures the rungs named in `only`, the one without a cap and the naive one; without names, all.

    together: the files of all files are at hand and the rungs take turns, so that the machine's drift hits them all
    alike; else one file after the other. keep: the files are not deleted.
    """
    wanted = {"resident", "naive", *only} if only else {rung.name for rung in rungs(window)}
    outcomes = [RungOutcome(rung) for rung in rungs(window) if rung.name in wanted]
    files: list[File] = list(dict.fromkeys(outcome.rung.file for outcome in outcomes))
    files.sort(key=lambda file: not model.path(file).exists())
    groups = [files] if together else [[file] for file in files]
    cap = int(model.n_bytes * share)
    for group in groups:
        try:
            for file in group:
                report(f"writing the {file} file")
                model.ensure(file)
            members = [outcome for outcome in outcomes if outcome.rung.file in group]
            for i in range(repeats):
                for outcome in members if i % 2 == 0 else members[::-1]:
                    _run(outcome, model, cap, stream, spec, f"run {i + 1} of {repeats}", report)
        finally:
            for file in group:
                if not keep:
                    model.remove(file)
    return outcomes


def _run(
    outcome: RungOutcome,
    model: ReproducedModel,
    cap: int,
    stream: Path,
    spec: dict[str, Any],
    which: str,
    report: Callable[[str], None],
) -> None:
    rung, path = outcome.rung, model.path(outcome.rung.file)
    if rung.flash is not None:
        settings = [Setting("flash")]
    elif rung.capped:
        settings = _worth_repeating(naive_settings(path), outcome)
    else:
        settings = [RESIDENT]
    for setting in settings:
        report(f"{rung.title} ({setting.name}), {which}")
        options = spec | {"work": "decode", "stream": str(stream), "flash": rung.flash or {}}
        outcome.runs.append(run(setting, path, cap if rung.capped else None, **options))


def _worth_repeating(settings: list[Setting], outcome: RungOutcome) -> list[Setting]:
    """Naive settings that were less than half as fast as the other one are not run again."""
    speed = {s: _median([r.tok_s for r in outcome.runs if r.setting == s and r.ok]) for s in settings}
    if not outcome.runs:
        return settings
    best = max((value or 0.0 for value in speed.values()), default=0.0)
    return [setting for setting in settings if (speed[setting] or 0.0) >= best / 2]


def table(outcomes: Sequence[RungOutcome], n_neurons: int, rates: Rates) -> list[Row]:
    """n_neurons: of all layers. rates: of the raw device."""
    resident = next(outcome for outcome in outcomes if outcome.rung.name == "resident")
    dense_compute = resident.median(_token_seconds)
    return [_row(outcome, dense_compute, n_neurons, rates) for outcome in outcomes]


def _row(outcome: RungOutcome, dense_compute: float | None, n_neurons: int, rates: Rates) -> Row:
    total = outcome.median(_token_seconds)
    read = outcome.median(lambda run: run.bytes_per_token)
    reads = rate = io = waited = None
    memory = outcome.median(lambda run: _per_token(run, "manage_seconds"))
    if outcome.rung.flash is not None:
        reads = outcome.median(lambda run: _per_token(run, "reads"))
        waited = outcome.median(lambda run: _per_token(run, "wait_seconds"))
        if read and reads:
            rate = rate_of(rates, read / reads)
            io = read / rate
    elif total is not None and dense_compute is not None:
        # page faults cannot be told from computing: what stock needs with all its memory is taken for the latter
        memory = 0.0
        io = waited = max(total - dense_compute, 0.0)
        rate = read / io if read and io else None
    failed = [run.error for run in outcome.chosen if not run.ok]
    newly = outcome.median(lambda run: _per_token(run, "neurons_newly_active"))
    return Row(
        rung=outcome.rung,
        dram=max((float(run.peak) for run in outcome.chosen if run.ok), default=None),
        tok_s=1 / total if total else None,
        total=total,
        read=read,
        reads=reads,
        rate=rate,
        io=io,
        waited=waited,
        memory=memory,
        compute=None if total is None or waited is None else total - waited - (memory or 0.0),
        predict=outcome.median(lambda run: _per_token(run, "predict_seconds")),
        newly_active=newly / n_neurons if newly is not None else None,
        hit_rate=outcome.median(lambda run: run.measured.get("hit_rate")),
        error=failed[0] if failed else "",
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    names = [name for name in Row.__dataclass_fields__ if name != "rung"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rung", *names])
        for row in rows:
            writer.writerow([row.rung.name, *(getattr(row, name) for name in names)])


def _token_seconds(run: Run) -> float | None:
    return 1 / run.tok_s if run.tok_s else None


def _per_token(run: Run, counter: str) -> float | None:
    value = run.measured.get("flash_counters", {}).get(counter)
    tokens = run.measured.get("tokens")
    return float(value) / float(tokens) if value is not None and tokens else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
