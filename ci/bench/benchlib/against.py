"""Two builds beside each other: both have a model loaded, each under a cap of its own, and take turns of a second.

What a machine does differently from minute to minute, its device and its clock, meets both alike. What a turn takes is
compared with the other build's next to it; the median of these ratios counts, with the interval in which it lies for
95 of 100 draws of as many pairs (bootstrap). A process keeps its luck, in where its pages lie, so there are several of
each build, one after the other; how far their medians are apart is told, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.table import Table

from benchlib import machine
from benchlib.cases import Case
from benchlib.child import Spec
from benchlib.models import Files
from llama_flash.errors import FlashError

_TAKER = Path(__file__).with_name("taker.py")
_WORKS = ("decode", "prompt")
_TURN = 1.0  # seconds, about; a prompt takes as long as it does
_WARM_TURNS = 3  # of each, that do not count
_LEAST_PAIRS = 6
_DRAWS = 2000


class BuildError(FlashError):
    """One of the builds could not load or compute."""


@dataclass(frozen=True)
class Comparison:
    """Seconds of each pair of turns, and what follows."""

    case: str
    tokens: int  # of each turn
    other: list[float]
    this: list[float]
    rounds: list[float]  # the median ratio of each pair of processes

    @property
    def ratios(self) -> np.ndarray:
        """Speed of this build over the other's, of each pair."""
        return np.array(self.other) / np.array(self.this)

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


def can_compare(case: Case) -> bool:
    return case.work in _WORKS and not case.drafts


def compare(
    case: Case,
    files: Files,
    python: str,
    seconds: float,
    rounds: int,
    report: Callable[[str], None],
) -> Comparison:
    """This build and that of `python` in turns, for about so many seconds, in processes that are new in each round.

    Raises:
        BuildError: one could not load the model, or ended.
    """
    other: list[float] = []
    this: list[float] = []
    medians = []
    tokens = 0
    for i in range(rounds):

        def told(text: str, i: int = i) -> None:
            report(f"{case.name}: round {i + 1} of {rounds}, {text}")

        pairs, tokens = _round(case, files, python, seconds / rounds, -(-_LEAST_PAIRS // rounds), tokens, told)
        other += [pair[0] for pair in pairs]
        this += [pair[1] for pair in pairs]
        medians.append(statistics.median(pair[0] / pair[1] for pair in pairs))
    return Comparison(case.name, tokens, other, this, medians)


def _round(
    case: Case, files: Files, python: str, seconds: float, least: int, tokens: int, report: Callable[[str], None]
) -> tuple[list[tuple[float, float]], int]:
    """Seconds of the other build and of this one, by pair; tokens of a turn, chosen if 0."""
    cap = int(files.flash.stat().st_size * case.cap_share)
    spec = dict(case.spec)
    if files.stream and case.work == "decode":
        spec["stream"] = str(files.stream)
    machine.drop_caches(files.flash)
    with _build(python, files, case, cap, spec) as other, _build(sys.executable, files, case, cap, spec) as this:
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


class _Taker:
    """A process that computes when it is told to."""

    def __init__(self, python: str, spec: Path, cap: int) -> None:
        self._python = python
        command = [sys.executable, "-m", "llama_flash", "cap", str(cap), "--", python, str(_TAKER), str(spec)]
        environment = {**os.environ, "LLAMA_FLASH_WARM_START": "0"}
        # threads that never stop spinning would take a core from the other build
        environment.pop("OMP_WAIT_POLICY", None)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        self._answer()

    def turn(self, tokens: int) -> float:
        """Seconds that it took to compute so many."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            print(tokens, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> float:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = " | ".join(self._errors.read().strip().splitlines()[-3:])
            raise BuildError(f"{self._python}: {said or 'ended'}")
        return float(line)

    def __enter__(self) -> _Taker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._errors.close()


@contextlib.contextmanager
def _build(python: str, files: Files, case: Case, cap: int, spec: dict[str, Any]) -> Iterator[_Taker]:
    with tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as folder:
        file = Path(folder) / "spec.json"
        child = Spec(model=str(files.flash), mode="flash", work=case.work, out="", flash=case.flash, **spec)
        file.write_text(json.dumps(asdict(child)))
        with _Taker(python, file, cap) as taker:
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
