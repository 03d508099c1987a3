"""A machine that is shared: tokens per second beside busy neighbours, and under a CPU quota.

A neighbour is a process that counts, pinned to one core; it ends by itself after a fixed number of steps, or when what
it disturbs has been measured. All ways to run have the model loaded and take turns, medians count. With another build's
Python (`--against`) there are its default, its threads that sleep at once (OMP_WAIT_POLICY=passive) and its single
thread to compare with.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchlib.child import Mode, Spec
from benchlib.models import DENSE_Q4, MOE_SKEWED, BenchModel
from benchlib.turns import Taker, spec_file
from llama_flash.budget.cores import default_threads

_STEPS = 30_000_000_000  # of a neighbour, in which it counts: longer than the longest situation
_COUNT = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nfor _ in range(int(sys.argv[2])): pass"
_PERIOD = 100_000  # microseconds, of a quota
_LAYERS = 3
_SPEC: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 64}
_BUDGET = "60%"  # of the model, for flash offload
_WARM_TOKENS = 100
_TURN = 0.6  # seconds, about


@dataclass(frozen=True)
class Way:
    """One way to run the engine."""

    name: str
    python: str
    threads: int
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Situation:
    """What the process shares its cores with."""

    name: str
    cores: tuple[int, ...] = ()  # that have a neighbour
    quota: float | None = None  # cores


QUIET = "quiet"
_THIS, _OTHER, _PASSIVE, _ONE = "this build", "other build", "other build, passive", "1 thread"


def situations() -> list[Situation]:
    cores = sorted(os.sched_getaffinity(0))
    return [
        Situation(QUIET),
        Situation("one neighbour", tuple(cores[:1])),
        Situation("a neighbour on each core", tuple(cores)),
        Situation("a quota of half of each core", quota=len(cores) / 2),
    ]


def ways(against: str | None) -> list[Way]:
    """This build, alone or beside another. What has one thread is the other build's."""
    n = default_threads()
    mine = [Way(_THIS, sys.executable, n), Way(_ONE, against or sys.executable, 1)]
    if against is None:
        return mine
    return [*mine, Way(_OTHER, against, n), Way(_PASSIVE, against, n, {"OMP_WAIT_POLICY": "passive"})]


@dataclass(frozen=True)
class Result:
    """Speeds of one model in one mode, in tokens per second: by situation, by way, one for each turn."""

    model: str
    mode: Mode
    tok_s: dict[str, dict[str, list[float]]]
    left_out: dict[str, str]  # situations, and why

    def verdicts(self) -> list[tuple[str, bool]]:
        """What was to be reached, and whether it was. Without another build: what this build alone can show."""
        found = []
        quiet = self.tok_s[QUIET]
        for name, speeds in self.tok_s.items():
            if name == QUIET:
                found.append((name, _ratio(speeds, _OTHER), "of the other build", 0.98))
            elif name == "one neighbour":
                best = min(_ratio(speeds, _PASSIVE), _ratio(speeds, _ONE))
                found.append((name, best, "of one thread or of threads that sleep", 0.9))
            else:
                found.append(
                    (name, statistics.median(speeds[_THIS]) / statistics.median(quiet[_THIS]), "of quiet", 0.4)
                )
        return [
            (f"{name}: {ratio:.2f} {what} (at least {least})", ratio >= least)
            for name, ratio, what, least in found
            if ratio != float("inf")
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdicts": [{"what": what, "reached": ok} for what, ok in self.verdicts()]}


def _ratio(speeds: dict[str, list[float]], way: str) -> float:
    """Of this build's speed and that of `way`: the median over the turns, which were next to each other. inf: none."""
    if way not in speeds:
        return float("inf")
    return statistics.median(mine / other for mine, other in zip(speeds[_THIS], speeds[way], strict=True))


def measure(
    folder: Path,
    seconds: float,
    against: str | None,
    report: Callable[[str], None],
    keep: bool = False,
) -> Iterator[Result]:
    """A mixture and a dense model, with flash offload and resident; so many seconds of turns in each situation.

    against: the Python of another build's environment. Raises OSError where the disk has no room for a model,
    BuildError where a process failed.
    """
    for model in (MOE_SKEWED, DENSE_Q4):
        files = model.ensure(folder, _LAYERS)
        try:
            for mode in ("flash", "resident"):
                yield _measure(model, files.flash, mode, seconds, ways(against), report)
        finally:
            if not keep:
                files.remove()


def _measure(
    model: BenchModel, path: Path, mode: Mode, seconds: float, chosen: Sequence[Way], report: Callable[[str], None]
) -> Result:
    speeds: dict[str, dict[str, list[float]]] = {}
    left_out: dict[str, str] = {}
    flash = {"dram_budget": _BUDGET, "follow": False} if mode == "flash" else {}
    with tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as specs, contextlib.ExitStack() as running:
        takers = {}
        for way in chosen:
            report(f"{model.name}, {mode}: loading, {way.name}")
            spec = Spec(str(path), mode, "decode", "", n_threads=way.threads, flash=flash, **_SPEC)
            takers[way.name] = running.enter_context(
                Taker(way.python, spec_file(specs, spec), environment=way.environment)
            )
            takers[way.name].turn(_WARM_TOKENS)
        for situation in situations():
            try:
                with _quota(situation.quota, [taker.pid for taker in takers.values()]), _neighbours(situation.cores):
                    title = f"{model.name}, {mode}, {situation.name}"
                    speeds[situation.name] = _turns(takers, seconds, title, report)
            except OSError as error:
                left_out[situation.name] = str(error)
    return Result(model.name, mode, speeds, left_out)


def _turns(
    takers: dict[str, Taker], seconds: float, title: str, report: Callable[[str], None]
) -> dict[str, list[float]]:
    """Tokens per second of each turn."""
    tokens = {name: max(1, round(4 * _TURN / taker.turn(4))) for name, taker in takers.items()}
    found: dict[str, list[float]] = {name: [] for name in takers}
    end = time.monotonic() + seconds
    order = list(takers)
    while time.monotonic() < end or len(found[order[0]]) < 2:
        report(f"{title}: {max(0.0, end - time.monotonic()):.0f} s left")
        random.shuffle(order)
        for name in order:
            found[name].append(tokens[name] / takers[name].turn(tokens[name]))
    return found


@contextlib.contextmanager
def _neighbours(cores: Sequence[int]) -> Iterator[None]:
    """Processes that count, one on each of these cores."""
    running = [subprocess.Popen([sys.executable, "-c", _COUNT, str(core), str(_STEPS)]) for core in cores]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _quota(cores: float | None, pids: Sequence[int]) -> Iterator[None]:
    """These processes in a group of that quota, which is removed at the end.

    Raises:
        OSError: there is no controller for CPU time here, or no right to make a group.
    """
    if cores is None:
        yield
        return
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    root = v1 if (v1 / "cgroup.procs").exists() else v2
    if root == v2 and "cpu" not in _text(v2 / "cgroup.subtree_control").split():
        raise FileNotFoundError("no CPU controller of cgroups is mounted here, or it is not handed down")
    group = root / f"llama-flash-bench-{os.getpid()}"
    group.mkdir()
    try:
        quota = int(cores * _PERIOD)
        if root == v1:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {_PERIOD}")
        _move(pids, group)
        yield
        _move(pids, root)
    finally:
        with contextlib.suppress(OSError):  # processes that are in it end with us
            group.rmdir()


def _move(pids: Sequence[int], group: Path) -> None:
    for pid in pids:
        (group / "cgroup.procs").write_text(str(pid))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def table(result: Result) -> Table:
    """tok/s by situation and way, and this build over each."""
    shown = Table(title=f"{result.model}, {result.mode}: tok/s on a machine that is shared", title_justify="left")
    shown.add_column("")
    names = list(result.tok_s[QUIET])
    for name in names:
        shown.add_column(name, justify="right")
    for situation, speeds in result.tok_s.items():
        cells = [f"{statistics.median(speeds[_THIS]):.2f}"]
        cells += [f"{statistics.median(speeds[name]):.2f} ({_ratio(speeds, name):.2f})" for name in names[1:]]
        shown.add_row(f"{situation}, {len(speeds[_THIS])} turns", *cells)
    for situation, why in result.left_out.items():
        shown.add_row(situation, why)
    shown.caption = "in brackets this build over that; " + "; ".join(
        f"{what}: {'yes' if reached else 'no'}" for what, reached in result.verdicts()
    )
    shown.caption_justify = "left"
    return shown
