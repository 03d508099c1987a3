"""Measures one case: all settings in turn, several times, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchlib import machine
from benchlib.cases import Case
from benchlib.child import FLASH_MODES
from benchlib.limits import FirstToken, Limit, RawRate, cpu_outside_kernels, cpu_seconds, kernel_seconds, raw_rate
from benchlib.models import Files
from benchlib.runs import Run, Setting, run

Report = Callable[[str], None]

FLASH, CACHED, RESIDENT, SINGLE = Setting("flash"), Setting("cached"), Setting("resident"), Setting("single")


def naive_settings(model: Path) -> list[Setting]:
    """The machine's readahead and, where it can be set, Linux's usual one; the better of which counts."""
    settings = [Setting("naive")]
    if machine.readahead_kb(model) != machine.LINUX_READAHEAD_KB and machine.can_set_readahead(model):
        settings.append(Setting("naive", machine.LINUX_READAHEAD_KB))
    return settings


@dataclass
class Outcome:
    case: Case
    model_bytes: int
    cap: int
    runs: list[Run] = field(default_factory=list)
    rates: list[RawRate] = field(default_factory=list)  # after each flash run
    touches: list[float] = field(default_factory=list)  # seconds of a first touch of its memory, after each flash run

    def of(self, setting: Setting) -> list[Run]:
        return [run for run in self.runs if run.setting == setting]

    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(run.setting for run in self.runs))

    def median(self, setting: Setting, key: str = "tok_s") -> float | None:
        """The median over the runs that finished; None where none did, 0 tok/s where one was killed."""
        return self._median(setting, lambda run: run.measured.get(key))

    def _median(self, setting: Setting, value_of: Callable[[Run], float | None]) -> float | None:
        values = [value_of(run) for run in self.of(setting) if run.ok]
        numbers = [float(value) for value in values if value is not None]
        return statistics.median(numbers) if numbers else None

    @property
    def naive(self) -> Setting | None:
        """The better naive setting."""
        candidates = [setting for setting in self.settings() if setting.mode == "naive"]
        return max(candidates, key=lambda setting: self.median(setting) or 0.0, default=None)

    def spread(self, setting: Setting) -> float | None:
        """Largest minus smallest tok/s, as a share of the median."""
        speeds, median = [run.tok_s for run in self.of(setting) if run.ok], self.median(setting)
        return (max(speeds) - min(speeds)) / median if median else None

    def limit(self) -> Limit | None:
        """None unless there are raw rates. With drafts: of one token at a time.

        Of whole models that do not fit into DRAM, computing is the kernels' time of the flash runs.
        """
        computing = self.median(CACHED if self.case.cached else RESIDENT)
        seconds = 1 / computing if computing else self.kernel_seconds() if self.case.beside_all else None
        read = self.median(SINGLE if self.case.drafts else FLASH, "flash_bytes_per_token")
        if not self.rates or not seconds or read is None:
            return None
        rate = statistics.median(rate.bytes_per_second for rate in self.rates)
        return Limit(read / rate, seconds)

    def kernel_seconds(self) -> float | None:
        return self._median(FLASH, kernel_seconds)

    def cpu_seconds(self, setting: Setting) -> float | None:
        return self._median(setting, cpu_seconds)

    def cpu_outside_kernels(self) -> float | None:
        return self._median(FLASH, cpu_outside_kernels)

    def cpu_over_resident(self) -> float | None:
        """Seconds for each token that flash takes more than resident. Other processes on the cores hardly move it."""
        flash, resident = self.cpu_seconds(FLASH), self.cpu_seconds(RESIDENT)
        return flash - resident if flash is not None and resident is not None else None

    def first_token(self) -> FirstToken | None:
        """From the load's begin, beside what it is compared with."""
        values = [_first_token(run) for run in self.of(FLASH) if run.ok]
        if not values or not self.rates:
            return None
        rate = max(rate.bytes_per_second for rate in self.rates)
        reading = statistics.median(value[1] for value in values) / rate
        return FirstToken(
            self.first_token_of(FLASH), reading, statistics.median(self.touches) if self.touches else None
        )

    def first_token_of(self, setting: Setting) -> float:
        """Seconds from the load's begin to the first token."""
        return statistics.median(_first_token(run)[0] for run in self.of(setting) if run.ok)

    def ratio(self, setting: Setting | None) -> float | None:
        """Flash's speed over that of `setting`."""
        flash, other = self.median(FLASH), self.median(setting) if setting else None
        return flash / other if flash and other else None

    def verdicts(self) -> list[tuple[str, bool]]:
        """What was to be reached, and whether it was."""
        targets, out = self.case.targets, []
        flash = self.of(FLASH)
        for wanted, ratio, name in (
            (targets.over_naive, self.ratio(self.naive), "naive"),
            (targets.over_resident, self.ratio(RESIDENT), "resident"),
        ):
            if wanted is not None:
                shown = f"{ratio:.2f}" if ratio is not None else "nothing"
                out.append((f"{shown} x {name} (at least {wanted})", ratio is not None and ratio >= wanted))
        if targets.over_limit is not None:
            limit, flash_speed = self.limit(), self.median(FLASH)
            share = flash_speed / limit.tok_s if limit and flash_speed else None
            shown = f"{share:.2f}" if share is not None else "nothing"
            out.append((f"{shown} of the limit (at least {targets.over_limit})", (share or 0) >= targets.over_limit))
        out += self._first_token_verdicts()
        if targets.reads_at_most_the_rest:
            read, most = self.median(FLASH, "device_bytes_per_token"), self.model_bytes - self.cap
            shown = f"{read / 1e6:.0f}" if read is not None else "?"
            out.append((f"{shown} MB read per token (at most {most / 1e6:.0f})", read is not None and read <= most))
        if self.case.work == "text" and not self.case.drafts and self.of(RESIDENT):
            out.append(("says what resident says", self._says_the_same()))
        peak = max((run.peak for run in flash), default=0)
        out.append((f"peak {peak / 1e6:.0f} MB of {self.cap / 1e6:.0f}", 0 < peak <= self.cap))
        out.append(("no OOM kill, all runs finished", all(run.ok and not run.oom_killed for run in flash)))
        return out

    def _first_token_verdicts(self) -> list[tuple[str, bool]]:
        most = self.case.targets.first_token
        if most is None or (first := self.first_token()) is None:
            return []
        beside = f"its bytes ({first.reading:.2f} s)"
        if first.touching is not None:
            beside = f"the slower of {beside} and the first touch of its memory ({first.touching:.2f} s)"
        out = [(f"first token {first.times:.2f} x {beside} (at most {most})", first.times <= most)]
        naive = [_first_token(run)[0] for run in self.runs if run.setting.mode == "naive" and run.ok]
        if naive:
            said = f"first token after {first.total:.1f} s, naive {min(naive):.1f} s"
            out.append((said, first.total < min(naive)))
        return out

    def _says_the_same(self) -> bool:
        """Whether greedy answers are the same, as far as both runs came."""
        runs = [run.measured["answers"] for run in (*self.of(FLASH), *self.of(RESIDENT)) if run.ok]
        pairs = [pair for answers in runs[1:] for pair in zip(runs[0], answers, strict=False)]
        return bool(pairs) and all(a == b for one, other in pairs for a, b in zip(one, other, strict=False))

    def to_json(self) -> dict[str, Any]:
        limit = self.limit()
        return {
            "case": self.case.name,
            "model": self.case.model.title,
            "work": self.case.work,
            "model_bytes": self.model_bytes,
            "cap_bytes": self.cap,
            "medians_tok_s": {setting.name: self.median(setting) for setting in self.settings()},
            "over_naive": self.ratio(self.naive),
            "naive_setting": self.naive.name if self.naive else None,
            "over_resident": self.ratio(RESIDENT),
            "spread": {setting.name: self.spread(setting) for setting in self.settings()},
            "limit": asdict(limit) | {"tok_s": limit.tok_s, "bound_by": limit.bound_by} if limit else None,
            "cpu_seconds_per_token": {setting.name: self.cpu_seconds(setting) for setting in self.settings()},
            "cpu_seconds_outside_kernels": self.cpu_outside_kernels(),
            "cpu_seconds_over_resident": self.cpu_over_resident(),
            "first_touch_seconds": self.touches,
            "raw_rates": [asdict(rate) for rate in self.rates],
            "verdicts": [{"what": what, "reached": reached} for what, reached in self.verdicts()],
            "runs": [run.to_json() for run in self.runs],
        }


def _first_token(run: Run) -> tuple[float, float]:
    """Seconds to the first token, the load included, and bytes that the device had to read for it."""
    return run.measured["load_seconds"] + run.measured["seconds"], run.measured["device_bytes"]


def settings_of(case: Case, files: Files, *, naive: bool | None) -> list[Setting]:
    """What a case compares. naive: whether also stock with mmap, which is slow; None: where the case's targets ask."""
    wanted = [FLASH, *([CACHED] if case.cached else [])]
    if case.beside_all or case.targets.over_resident or (case.targets.over_limit and not case.cached):
        wanted.append(RESIDENT)
    if case.drafts:
        wanted.append(SINGLE)
    if naive is None:
        naive = bool(case.beside_all or case.targets.over_naive or case.targets.first_token)
    if naive:
        wanted = [*naive_settings(files.stock), *wanted]
    return wanted


def measure(
    case: Case, files: Files, settings: Sequence[Setting], repeats: int, report: Report, **overrides: Any
) -> Outcome:
    """Runs all settings once, then again in the other order, and so on: drift of the machine hits all of them alike.

    overrides: of fields of child.Spec, and arguments of `run`.
    A naive setting that is less than half as fast as the other one is not repeated. A whole model that does not fit
    into the memory that is free just before is not run there.
    """
    model_bytes = files.stock.stat().st_size
    outcome = Outcome(case, model_bytes, case.cap(model_bytes))
    remaining = list(settings)
    spec = case.spec | overrides
    rests = case.targets.first_touch and overrides.get("patience") != 0.0
    if files.stream and case.work in ("decode", "text"):
        spec |= {"stream": str(files.stream)}
    for i in range(repeats):
        for setting in remaining if i % 2 == 0 else remaining[::-1]:
            if setting == RESIDENT and case.beside_all and not machine.fits(model_bytes):
                report(f"{case.name}: no {setting.name} run, for which the machine has too little memory free")
                continue
            report(f"{case.name}: {setting.name}, run {i + 1} of {repeats}")
            ours = setting.mode in FLASH_MODES
            cap = None if setting in (RESIDENT, CACHED) else outcome.cap
            # without a limit in force everything would fit, and be loaded as stock does: named weights stay on flash
            flash = case.flash | ({"what": "ffn"} if setting == CACHED else {}) if ours else {}
            model = files.flash if ours else files.stock
            draft = {} if setting == FLASH else {"draft": 0}
            if rests:
                machine.rest(files.flash, files.stock)
            result = run(setting, model, cap, work=case.work, flash=flash, **(spec | draft))
            outcome.runs.append(result)
            if setting == FLASH and result.ok:
                rate = raw_rate(files.flash, result)
                outcome.rates += [rate] if rate else []
                if case.targets.first_touch:
                    if rests:
                        machine.rest(files.flash, files.stock)
                    outcome.touches.append(machine.first_touch(result.measured["anonymous_bytes"]))
        best = max((outcome.median(setting) or 0.0 for setting in remaining if setting.mode == "naive"), default=0.0)
        remaining = [s for s in remaining if s.mode != "naive" or (outcome.median(s) or 0.0) >= best / 2]
    return outcome
