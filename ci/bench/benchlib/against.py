"""Two builds, or one with other settings, beside each other: both have a model loaded, each under a cap of its own, and
take turns of a second. What begins with a load, or needs a process of its own (a first token, drafts), is run in such
turns instead.

What a machine does differently from minute to minute, its device and its clock, meets both alike. What a turn takes is
compared with the other build's next to it; the median of these ratios counts, with the interval in which it lies for
95 of 100 draws of as many pairs (bootstrap). A process keeps its luck, in where its pages lie, so there are several of
each build, one after the other; how far their medians are apart is told, too.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from benchlib import machine
from benchlib.cases import Case
from benchlib.child import Spec
from benchlib.measure import FLASH
from benchlib.models import Files
from benchlib.runs import run
from benchlib.turns import BuildError, Taker, spec_file

_WORKS = ("decode", "text", "prompt")
_TURN = 1.0  # seconds, about; a prompt takes as long as it does
_WARM_TURNS = 3  # of each, that do not count
_LEAST_PAIRS = 6
_DRAWS = 2000


@dataclass(frozen=True)
class Other:
    """What this build, as it is by default, is compared with."""

    python: str = sys.executable  # of its environment
    flash: dict[str, Any] = field(default_factory=dict)  # options of FlashOffload beside the case's


@dataclass(frozen=True)
class Comparison:
    """Seconds of each pair of turns, and what follows."""

    case: str
    tokens: int  # of each turn
    other: list[float]
    this: list[float]
    rounds: list[float]  # the median ratio of each pair of processes

    @property
    def ratios(self) -> npt.NDArray[np.float64]:
        """Speed of this build over the other's, of each pair."""
        return np.divide(self.other, self.this)

    def ratio(self) -> float:
        return float(np.median(self.ratios))

    def interval(self) -> tuple[float, float]:
        """In which the median lies for 95 of 100 draws."""
        ratios = self.ratios
        rng = np.random.default_rng(0)
        medians = np.median(rng.choice(ratios, (_DRAWS, len(ratios))), axis=1)
        low, high = np.quantile(medians, (0.025, 0.975))
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio(), "interval": self.interval()}


def compare(
    case: Case,
    files: Files,
    other: Other,
    seconds: float,
    rounds: int,
    report: Callable[[str], None],
) -> Comparison:
    """This build and the other in turns, for about so many seconds, in processes that are new in each round.

    Raises:
        BuildError: one could not load the model, or ended.
    """
    if case.work not in _WORKS or case.drafts:
        return _compare_processes(case, files, other, rounds, report)
    others: list[float] = []
    this: list[float] = []
    medians = []
    tokens = 0
    for i in range(rounds):

        def told(text: str, i: int = i) -> None:
            report(f"{case.name}: round {i + 1} of {rounds}, {text}")

        pairs, tokens = _round(case, files, other, seconds / rounds, -(-_LEAST_PAIRS // rounds), tokens, told)
        others += [pair[0] for pair in pairs]
        this += [pair[1] for pair in pairs]
        medians.append(statistics.median(pair[0] / pair[1] for pair in pairs))
    return Comparison(case.name, tokens, others, this, medians)


def _compare_processes(
    case: Case, files: Files, other: Other, rounds: int, report: Callable[[str], None]
) -> Comparison:
    """A process of each build for each pair, the page cache emptied before."""
    builds = (other, Other())
    took: tuple[list[float], list[float]] = ([], [])
    cap, tokens = case.cap(files.flash.stat().st_size), 1
    pairs = max(rounds, _LEAST_PAIRS)
    for i in range(pairs):
        for k in (0, 1) if i % 2 == 0 else (1, 0):
            python, flash = builds[k].python, case.flash | builds[k].flash
            report(f"{case.name}: pair {i + 1} of {pairs}, {python}")
            done = run(FLASH, files.flash, cap, python=python, work=case.work, flash=flash, **case.spec)
            if not done.ok:
                raise BuildError(f"{python}: {done.error}")
            tokens = done.measured["tokens"]
            load = done.measured["load_seconds"] if case.work == "first" else 0.0
            took[k].append(load + done.measured["seconds"])
    return Comparison(case.name, tokens, *took, [a / b for a, b in zip(*took, strict=True)])


def _round(
    case: Case, files: Files, than: Other, seconds: float, least: int, tokens: int, report: Callable[[str], None]
) -> tuple[list[tuple[float, float]], int]:
    """Seconds of the other build and of this one, by pair; tokens of a turn, chosen if 0."""
    cap = case.cap(files.flash.stat().st_size)
    spec = dict(case.spec)
    if files.stream and case.work in ("decode", "text"):
        spec["stream"] = str(files.stream)
    machine.drop_caches(files.flash)
    with _build(than, files, case, cap, spec) as other, _build(Other(), files, case, cap, spec) as this:
        begun = tokens or (int(spec.get("tokens", 0)) if case.work == "prompt" else 4)
        for taker in (other, this):
            took = [taker.turn(begun) for _ in range(_WARM_TURNS)]
        if not tokens:
            tokens = begun if case.work == "prompt" else max(1, round(_TURN * begun / min(took)))
        pairs: list[tuple[float, float]] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(pairs) < least:
            report(f"pair {len(pairs) + 1}, {max(0.0, end - time.monotonic()):.0f} s left")
            # whoever was second is first: half of the pairs meet what came before from the other side
            both = (other, this) if len(pairs) % 2 == 0 else (this, other)
            took = [taker.turn(tokens) for taker in both]
            pairs.append((took[0], took[1]) if both[0] is other else (took[1], took[0]))
    return pairs, tokens


@contextlib.contextmanager
def _build(build: Other, files: Files, case: Case, cap: int, spec: dict[str, Any]) -> Iterator[Taker]:
    with tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as folder:
        child = Spec(
            model=str(files.flash), mode="flash", work=case.work, out="", flash=case.flash | build.flash, **spec
        )
        with Taker(build.python, spec_file(folder, child), cap) as taker:
            yield taker


def table(comparisons: list[Comparison]) -> Table:
    """Speed of this build over the other's."""
    shown = Table(title="this build beside the other, both under the case's cap, in turns", title_justify="left")
    for column in ("case", "tokens per turn", "pairs", "other", "this", "this / other", "95 %", "by process"):
        shown.add_column(column, justify="left" if column == "case" else "right")
    for found in comparisons:
        low, high = found.interval()
        speeds = [f"{found.tokens / float(np.median(took)):.2f} tok/s" for took in (found.other, found.this)]
        n_pairs = str(len(found.this))
        shown.add_row(
            found.case,
            str(found.tokens),
            n_pairs,
            *speeds,
            f"{found.ratio():.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{min(found.rounds):.3f} to {max(found.rounds):.3f}",
        )
    return shown
