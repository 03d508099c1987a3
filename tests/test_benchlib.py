"""Threads of the benchmarks: those that are measured spin, those of the process that measures never take a core."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
    folder = Path(__file__).parents[1] / "ci"
    command = [sys.executable, "-c", CODE, str(cap)]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.split() == ["passive", "False", "active", "False"]
