"""Loads mutated files in processes of their own, and says what became of each.

A worker takes bases and seeds on its standard input and answers a line for each; when it dies, the case that it was at
is told with the signal, and another worker goes on with the next.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_SECONDS = 1.0  # of processor time
MOST_GROWTH = 200 << 20  # bytes of memory, at the peak
NO_MEMORY = "budget: "  # what is told of a file that claims more than this machine has
_PATIENCE = 300  # seconds until a case counts as endless
_AT_ONCE = 2  # workers
_PLANNED = 4  # of as many cases one is planned, too
_N_CTX = 64


@dataclass(frozen=True)
class Case:
    """What became of one mutated file."""

    base: str
    seed: int
    died: int = 0  # exit status of the worker: minus a signal
    stage: str = ""  # where it was then
    check: str = ""  # what the check said, "" if it let the file pass
    flash: str = ""  # the same of a load with flash offload
    stock: str | None = None  # and of one without; None: not tried
    plan: str | None = None
    seconds: float = 0.0  # of processor time, the most of one of these but stock
    growth: int = 0  # bytes

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        if self.died:
            return [f"ended the process with {self.died} ({self.stage})"]
        said = []
        if not self.flash.startswith(NO_MEMORY):
            if bool(self.check) != bool(self.flash):
                said.append(f"check {self.check or 'passes'!r}, load {self.flash or 'passes'!r}")
            if self.plan is not None and bool(self.plan) != bool(self.flash):
                said.append(f"plan {self.plan or 'passes'!r}, load {self.flash or 'passes'!r}")
            if self.flash and self.stock == "":
                said.append(f"stock loads it, flash offload does not: {self.flash!r}")
        for name in ("check", "plan", "flash", "stock"):
            if (getattr(self, name) or "").startswith("!"):
                said.append(f"{name} {getattr(self, name)}")
        if self.seconds > MOST_SECONDS:
            said.append(f"took {self.seconds:.1f} s")
        if self.growth > MOST_GROWTH:
            said.append(f"took {self.growth >> 20} MiB")
        return said


def run(bases: Sequence[Path], seeds: Iterable[int], folder: Path) -> Iterator[Case]:
    """Cases of seed s of base s % len(bases), in any order. folder: for the files."""
    todo = iter([(str(bases[seed % len(bases)]), seed) for seed in seeds])
    lock = threading.Lock()
    done: queue.Queue[Case | None] = queue.Queue()

    def work(number: int) -> None:
        try:
            with _Worker(folder / f"{number}.gguf") as worker:
                while True:
                    with lock:
                        one = next(todo, None)
                    if one is None:
                        return
                    done.put(worker.ask(*one))
        finally:
            done.put(None)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        workers = [pool.submit(work, number) for number in range(_AT_ONCE)]
        left = _AT_ONCE
        while left:
            case = done.get()
            if case is None:
                left -= 1
            else:
                yield case
    for worker in workers:
        worker.result()


class _Worker:
    """A process that loads files, made anew when it has died."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def ask(self, base: str, seed: int) -> Case:
        if self._process is None:
            environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self._path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
                cwd=Path(__file__).parent,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{base}\t{seed}\n")
        process.stdin.flush()
        guard = threading.Timer(_PATIENCE, process.kill)
        guard.start()
        stage = ""
        try:
            while line := process.stdout.readline():
                if line.startswith("{"):
                    return Case(base, seed, **json.loads(line))
                stage = line.strip()
        finally:
            guard.cancel()
        self._process = None
        return Case(base, seed, died=process.wait() or 1, stage=stage)


def _work(path: Path) -> None:
    """The worker's side."""
    from gguf_mutations import Head, mutated

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    heads: dict[str, Head] = {}
    for line in sys.stdin:
        base, seed = line.rstrip("\n").split("\t")
        if base not in heads:
            heads[base] = Head.of(Path(base))
        mutated(heads[base], int(seed)).save(path)
        result = judge(path, lambda stage: print(stage, file=answers), planned=int(seed) % _PLANNED == 0)
        print(json.dumps(result), file=answers)


def judge(path: Path, begin: Any = lambda stage: None, *, planned: bool = True) -> dict[str, Any]:
    """What check, plan and loads say of a file; "!" before what is not one of their errors. planned: ask for a plan."""
    import llama_cpp

    from llama_flash import FlashBudgetError, FlashError
    from llama_flash.device.profile import DeviceProfile
    from llama_flash.planning.dry_run import check_model
    from llama_flash.planning.planner import plan

    profile = _profile()

    def load(flash_offload: bool) -> None:
        llm = llama_cpp.Llama(str(path), n_ctx=_N_CTX, flash_offload=flash_offload, verbose=False, n_threads=1)
        try:
            llm.eval([1, 2])
        finally:
            llm.close()

    assert isinstance(profile, DeviceProfile)
    stages = {
        "check": lambda: check_model(path),
        "plan": lambda: plan(path, n_ctx=_N_CTX, profile=profile),
        "flash": lambda: load(True),
        "stock": lambda: load(False),
    }
    if not planned:
        del stages["plan"]
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    most, growth = 0.0, 0
    result: dict[str, Any] = {}
    for stage, call in stages.items():
        if stage == "stock":  # its time and memory are its own affair
            growth = _status("VmHWM") - before
            if not result["flash"]:
                break
        begin(stage)
        began = time.process_time()
        try:
            call()
            result[stage] = ""
        except FlashBudgetError as error:
            result[stage] = f"{NO_MEMORY}{error}"
        except FlashError as error:
            result[stage] = str(error)
        except Exception as error:
            result[stage] = f"!{type(error).__name__}: {error}"
        if stage != "stock":
            most = max(most, time.process_time() - began)
    return {**result, "seconds": most, "growth": growth}


def _profile() -> Any:
    from llama_flash.device.profile import DeviceProfile
    from llama_flash.planning.planner import profile_for

    if not hasattr(_profile, "kept"):
        _profile.kept = profile_for(__file__)  # type: ignore[attr-defined]
    kept: DeviceProfile = _profile.kept  # type: ignore[attr-defined]
    return kept


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in text.splitlines() if line.startswith(name)).split()[1]) << 10


if __name__ == "__main__":
    os.environ["LLAMA_FLASH_WARM_START"] = "0"
    _work(Path(sys.argv[1]))
