"""Runs child.py in a fresh process under a memory cap, with the page cache emptied, and reads what it measured."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchlib import machine
from benchlib.child import Mode, Spec
from llama_flash.budget.capped import run_capped

_CHILD = Path(__file__).with_name("child.py")
_TIMEOUT = 900.0  # seconds; a naive run under a tight cap loads for minutes

# a run must not begin with what another one has left warm
os.environ["LLAMA_FLASH_WARM_START"] = "0"

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Setting:
    """One way to run a model."""

    mode: Mode
    readahead_kb: int | None = None  # None: the machine's

    @property
    def name(self) -> str:
        return self.mode if self.readahead_kb is None else f"{self.mode}, readahead {self.readahead_kb} KiB"


@dataclass
class Run:
    setting: Setting
    cap: int | None  # bytes; None: not capped
    ok: bool
    peak: int  # bytes, of the cgroup (page cache counted); without a cap the largest resident set
    oom_killed: bool
    other_cpus: float  # CPUs that were busy when the run began
    caches_dropped: bool
    measured: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def tok_s(self) -> float:
        return float(self.measured.get("tok_s", 0.0))

    @property
    def bytes_per_token(self) -> float:
        return float(self.measured.get("device_bytes_per_token", 0.0))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"setting": self.setting.name}


def run(
    setting: Setting,
    model: Path,
    cap: int | None,
    *,
    busy_limit: float = 0.4,
    patience: float = 60.0,
    timeout: float = _TIMEOUT,
    show: bool = False,
    python: str = sys.executable,
    **spec: Any,
) -> Run:
    """Runs `model` once. spec: fields of child.Spec. show: the child's output goes to the terminal.

    python: of the environment whose build runs it.

    patience: seconds to wait until at most `busy_limit` CPUs are busy. Raises
    KeyboardInterrupt when the run was stopped by a signal, FlashCapError where memory cannot be limited.
    """
    other_cpus = machine.wait_until_idle(busy_limit, patience)
    dropped = machine.drop_caches(model)
    with (
        tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as folder,
        machine.readahead(model, setting.readahead_kb),
    ):
        out, spec_file = Path(folder) / "out.json", Path(folder) / "spec.json"
        child = Spec(model=str(model), mode=setting.mode, out=str(out), **spec)
        spec_file.write_text(json.dumps(dataclasses.asdict(child)))
        try:
            ended = _execute([python, str(_CHILD), str(spec_file)], cap, show, timeout)
        except subprocess.TimeoutExpired:
            ended = _Ended(-1, f"not done after {timeout:.0f} s", 0, 0)
        measured = json.loads(out.read_text()) if out.exists() else {}
    ok = ended.returncode == 0 and bool(measured)
    return Run(
        setting=setting,
        cap=cap,
        ok=ok,
        peak=ended.peak if cap is not None else int(measured.get("max_rss", 0)),
        oom_killed=ended.oom_kills > 0,
        other_cpus=round(other_cpus, 2),
        caches_dropped=dropped,
        measured=measured,
        error="" if ok else " | ".join(ended.stderr.strip().splitlines()[-3:]) or f"exit status {ended.returncode}",
    )


@dataclass(frozen=True)
class _Ended:
    returncode: int
    stderr: str
    peak: int
    oom_kills: int


def _execute(argv: list[str], cap: int | None, show: bool, timeout: float = _TIMEOUT) -> _Ended:
    if cap is None:
        done = subprocess.run(argv, timeout=timeout, check=False, capture_output=not show, text=True, errors="replace")
        return _Ended(done.returncode, done.stderr or "", 0, 0)
    capped = run_capped(cap, argv, timeout=timeout, capture_output=not show)
    # run_capped passes signals on to what it runs, which ends; here they end all that was to follow as well
    if capped.interrupted or -capped.returncode in _STOPPING:
        raise KeyboardInterrupt
    return _Ended(capped.returncode, capped.stderr or "", capped.peak_bytes or 0, capped.oom_kills)


def stop_on_signals() -> None:
    """Lets `kill` and a closed terminal unwind like Ctrl-C, so that settings are restored and models deleted."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    for number in _STOPPING[1:]:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
