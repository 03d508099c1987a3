"""Measures one case: all settings in turn, several times, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchlib import machine
from benchlib.cases import Case
from benchlib.runs import Run, Setting, run

Report = Callable[[str], None]

FLASH, RESIDENT = Setting("flash"), Setting("resident")


def naive_settings(model: Path) -> list[Setting]:
    """The machine's readahead and Linux's usual one, the better of which counts."""
    settings = [Setting("naive")]
    if machine.readahead_kb(model) not in (None, machine.LINUX_READAHEAD_KB):
        settings.append(Setting("naive", machine.LINUX_READAHEAD_KB))
    return settings


@dataclass
class Outcome:
    case: Case
    model_bytes: int
    cap: int
    runs: list[Run] = field(default_factory=list)

    def of(self, setting: Setting) -> list[Run]:
        return [run for run in self.runs if run.setting == setting]

    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(run.setting for run in self.runs))

    def median(self, setting: Setting, key: str = "tok_s") -> float | None:
        """The median over the runs that finished; None where none did, 0 tok/s where one was killed."""
        values = [run.measured.get(key) for run in self.of(setting) if run.ok]
        numbers = [float(value) for value in values if value is not None]
        return statistics.median(numbers) if numbers else None

    @property
    def naive(self) -> Setting | None:
        """The better naive setting."""
        candidates = [setting for setting in self.settings() if setting.mode == "naive"]
        return max(candidates, key=lambda setting: self.median(setting) or 0.0, default=None)

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
        if targets.reads_at_most_the_rest:
            read, most = self.median(FLASH, "device_bytes_per_token"), self.model_bytes - self.cap
            shown = f"{read / 1e6:.0f}" if read is not None else "?"
            out.append((f"{shown} MB read per token (at most {most / 1e6:.0f})", read is not None and read <= most))
        peak = max((run.peak for run in flash), default=0)
        out.append((f"peak {peak / 1e6:.0f} MB of {self.cap / 1e6:.0f}", 0 < peak <= self.cap))
        out.append(("no OOM kill, all runs finished", all(run.ok and not run.oom_killed for run in flash)))
        return out

    def to_json(self) -> dict[str, Any]:
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
            "verdicts": [{"what": what, "reached": reached} for what, reached in self.verdicts()],
            "runs": [run.to_json() for run in self.runs],
        }


def measure(
    case: Case, model: Path, settings: Sequence[Setting], repeats: int, report: Report, **overrides: Any
) -> Outcome:
    """Runs all settings once, then again in the other order, and so on: drift of the machine hits all of them alike.

    A naive setting that is less than half as fast as the other one is not repeated.
    """
    model_bytes = model.stat().st_size
    outcome = Outcome(case, model_bytes, int(model_bytes * case.cap_share))
    remaining = list(settings)
    for i in range(repeats):
        for setting in remaining if i % 2 == 0 else remaining[::-1]:
            report(f"{case.name}: {setting.name}, run {i + 1} of {repeats}")
            cap = None if setting.mode == "resident" else outcome.cap
            outcome.runs.append(run(setting, model, cap, work=case.work, **(case.spec | overrides)))
        best = max((outcome.median(setting) or 0.0 for setting in remaining if setting.mode == "naive"), default=0.0)
        remaining = [s for s in remaining if s.mode != "naive" or (outcome.median(s) or 0.0) >= best / 2]
    return outcome
