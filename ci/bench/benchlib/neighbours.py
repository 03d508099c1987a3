"""A machine that is shared: tokens per second beside busy neighbours, and under a CPU quota.

A neighbour is a process that counts, pinned to one core; it ends by itself after a fixed number of steps, or when the
run that it disturbs has ended. All ways to run are measured in turns in every situation, medians count. With another
build's Python (`--against`) there are its default, its threads that sleep at once (OMP_WAIT_POLICY=passive) and its
single thread to compare with.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from benchlib import machine
from benchlib.child import Mode, Spec
from benchlib.models import DENSE_Q4, MOE_SKEWED, BenchModel
from llama_flash.budget.cores import default_threads

_CHILD = Path(__file__).with_name("child.py")
_STEPS = 4_000_000_000  # of a neighbour, in which it counts: a few minutes
_COUNT = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nfor _ in range(int(sys.argv[2])): pass"
_TIMEOUT = 300.0  # seconds, of one run
_PERIOD = 100_000  # microseconds, of a quota
_LAYERS = 3
_SPEC = {"n_ctx": 256, "n_ubatch": 64, "warm_up": 16, "tokens": 96, "max_seconds": 6.0, "min_tokens": 3}
_BUDGET = "60%"  # of the model, for flash offload


@dataclass(frozen=True)
class Way:
    """One way to run the engine."""

    name: str
    python: str
    threads: int | None  # None: as the build chooses
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Situation:
    """What the process shares its cores with."""

    name: str
    cores: tuple[int, ...] = ()  # that have a neighbour
    quota: float | None = None  # cores


QUIET = "quiet"


def situations() -> list[Situation]:
    cores = sorted(os.sched_getaffinity(0))
    return [
        Situation(QUIET),
        Situation("one neighbour", tuple(cores[:1])),
        Situation("a neighbour on each core", tuple(cores)),
        Situation("a quota of half of each core", quota=len(cores) / 2),
    ]


def ways(against: str | None) -> list[Way]:
    """This build, alone or beside another."""
    n = default_threads()
    mine = [Way("this build", sys.executable, None), Way(f"this build, {n} threads", sys.executable, n)]
    if against is None:
        return [*mine, Way("1 thread", sys.executable, 1)]
    spinning = {"OMP_WAIT_POLICY": ""}  # removed: OpenMP's default
    return [
        *mine,
        Way("other build", against, n, spinning),
        Way("other build, passive", against, n, {"OMP_WAIT_POLICY": "passive"}),
        Way("other build, 1 thread", against, 1, spinning),
    ]


@dataclass(frozen=True)
class Result:
    """Medians of one model in one mode: by situation, by way; None where no run ended."""

    model: str
    mode: Mode
    tok_s: dict[str, dict[str, float | None]]
    left_out: dict[str, str]  # situations, and why

    def verdicts(self) -> list[tuple[str, bool]]:
        """What was to be reached, and whether it was. Without another build: what this build alone can show."""
        found = []
        quiet = self.tok_s[QUIET]
        for name, speeds in self.tok_s.items():
            mine = _best(speeds, "this build")
            if name == QUIET:
                found.append((name, mine, _best(speeds, "other build"), 0.98))
            elif name == "one neighbour":
                others = (
                    _best(speeds, "other build, passive"),
                    _best(speeds, "other build, 1"),
                    _best(speeds, "1 thread"),
                )
                found.append((name, mine, max(others), 0.9))
            else:
                found.append((name, mine, _best(quiet, "this build"), 0.4))
        return [
            (f"{name}: {mine / other:.2f} (at least {least})", mine >= least * other)
            for name, mine, other, least in found
            if other
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdicts": [{"what": what, "reached": ok} for what, ok in self.verdicts()]}


def _best(speeds: dict[str, float | None], beginning: str) -> float:
    return max((speed or 0.0 for name, speed in speeds.items() if name.startswith(beginning)), default=0.0)


def measure(
    folder: Path, repeats: int, against: str | None, report: Callable[[str], None], keep: bool = False
) -> Iterator[Result]:
    """A mixture and a dense model, with flash offload and resident.

    against: the Python of another build's environment. Raises OSError where the disk has no room for a model.
    """
    for model in (MOE_SKEWED, DENSE_Q4):
        files = model.ensure(folder, _LAYERS)
        try:
            for mode in ("flash", "resident"):
                yield _measure(model, files.flash, mode, repeats, ways(against), report)
        finally:
            if not keep:
                files.remove()


def _measure(
    model: BenchModel, path: Path, mode: Mode, repeats: int, chosen: Sequence[Way], report: Callable[[str], None]
) -> Result:
    speeds: dict[str, dict[str, float | None]] = {}
    left_out: dict[str, str] = {}
    for situation in situations():
        try:
            with _quota(situation.quota) as group:
                runs: dict[str, list[float]] = {way.name: [] for way in chosen}
                for i in range(repeats):
                    for way in chosen if i % 2 == 0 else chosen[::-1]:
                        report(f"{model.name}, {mode}, {situation.name}: {way.name}, run {i + 1} of {repeats}")
                        speed = _run(path, mode, way, situation, group)
                        runs[way.name] += [] if speed is None else [speed]
        except OSError as error:
            left_out[situation.name] = str(error)
            continue
        speeds[situation.name] = {name: statistics.median(found) if found else None for name, found in runs.items()}
    return Result(model.name, mode, speeds, left_out)


def _run(path: Path, mode: Mode, way: Way, situation: Situation, group: Path | None) -> float | None:
    """Tokens per second of one process; None if it failed."""
    machine.wait_until_idle(0.4, 20.0)
    with tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as folder, _neighbours(situation.cores):
        out, spec_file = Path(folder) / "out.json", Path(folder) / "spec.json"
        flash = {"dram_budget": _BUDGET, "follow": False} if mode == "flash" else {}
        spec = Spec(model=str(path), mode=mode, work="decode", out=str(out), flash=flash, **_SPEC)  # type: ignore[arg-type]
        spec = replace(spec, n_threads=way.threads or 0)  # 0: the engine's default
        spec_file.write_text(json.dumps(asdict(spec)))
        argv = [way.python, str(_CHILD), str(spec_file)]
        if group is not None:
            argv = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *argv]
        environment = {**os.environ, "LLAMA_FLASH_WARM_START": "0", **way.environment}
        environment = {name: value for name, value in environment.items() if value or name not in way.environment}
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(argv, env=environment, timeout=_TIMEOUT, check=True, capture_output=True)
        return float(json.loads(out.read_text())["tok_s"]) if out.exists() else None


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
def _quota(cores: float | None) -> Iterator[Path | None]:
    """A group of that quota, removed at the end.

    Raises:
        OSError: there is no controller for CPU time here, or no right to make a group.
    """
    if cores is None:
        yield None
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
        yield group
    finally:
        group.rmdir()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def table(result: Result) -> Table:
    """tok/s by situation and way."""
    shown = Table(title=f"{result.model}, {result.mode}: tok/s on a machine that is shared", title_justify="left")
    shown.add_column("")
    names = list(result.tok_s[QUIET])
    for name in names:
        shown.add_column(name, justify="right")
    for situation, speeds in result.tok_s.items():
        shown.add_row(situation, *("failed" if (speed := speeds[name]) is None else f"{speed:.2f}" for name in names))
    for situation, why in result.left_out.items():
        shown.add_row(situation, why)
    shown.caption = "; ".join(f"{what}: {'yes' if reached else 'no'}" for what, reached in result.verdicts())
    shown.caption_justify = "left"
    return shown
