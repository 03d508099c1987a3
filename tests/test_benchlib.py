"""Threads of the benchmarks: those that are measured spin, those of the process that measures never take a core."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).parents[1] / "ci"
CODE = """
import os, sys
from benchlib.runs import _execute
print(os.environ["OMP_WAIT_POLICY"], "GOMP_SPINCOUNT" in os.environ, flush=True)
show = "import os; print(os.environ['OMP_WAIT_POLICY'], 'GOMP_SPINCOUNT' in os.environ, flush=True)"
_execute([sys.executable, "-c", show], int(sys.argv[1]) or None, True)
"""


@pytest.mark.parametrize("cap", [0, 256 << 20])
def test_only_what_is_measured_spins(cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    command = [sys.executable, "-c", CODE, str(cap)]
    output = subprocess.run(command, cwd=CI, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.split() == ["passive", "False", "active", "False"]


STOPPED = """
import sys
from benchlib.runs import _execute, stop_on_signals
stop_on_signals()
try:
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    _execute(command, int(sys.argv[1]) or None, True)
except KeyboardInterrupt:
    print("stopped")
else:
    print("the next one")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("cap", [0, 256 << 20])
def test_a_signal_during_a_run_stops_what_would_follow(cap: int, number: signal.Signals) -> None:
    command = [sys.executable, "-c", STOPPED, str(cap)]
    with subprocess.Popen(command, cwd=CI, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == "stopped\n"
