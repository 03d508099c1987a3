"""`llama-flash bench`: what is measured, beside what, and how it is told. Not how fast it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ModelFile

from llama_flash.budget.cgroup import memory_controller

BENCH = [sys.executable, "-m", "llama_flash", "bench"]


@pytest.fixture
def model(model_file: ModelFile) -> Path:
    return model_file("qwen3moe")


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BENCH, *map(str, arguments)], capture_output=True, text=True, timeout=290)


def test_budgets_caps_and_stock_are_measured_as_often_as_asked(model: Path) -> None:
    options = ("--cap", "50%", "--naive", "--repeats", 2, "-n", 6, "--json")
    result = bench(model, *options)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    rows = {(row["kind"], row["limit"], row["asked"]): row for row in report["rows"]}
    assert list(rows) == [
        ("flash", "cap", "50%"),
        ("naive", "cap", "50%"),
        ("resident", None, None),
    ]
    texts = set()
    for row in rows.values():
        assert row["error"] is None and len(row["runs"]) == 2
        rate = row["tokens_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        texts |= {run["text"] for run in row["runs"]}
        if row["limit"] == "cap":
            assert 0 < row["peak_bytes"] <= row["bytes"]
        if row["kind"] == "flash":
            assert row["runs"][0]["flash"]["mode"] == "flash" and row["bytes_per_token"] >= 0
            assert row["runs"][0]["flash"]["decode"]["tokens"] >= 5
    assert len(texts) == 1, "the same text whatever the memory"
    assert result.stderr.count("run 2, ") == 3


def test_what_does_not_work_is_said_and_the_rest_is_measured(model: Path) -> None:
    result = bench(model, "--dram-budget", "8MiB", "--dram-budget", "25%", "--no-resident", "--repeats", 1, "-n", 3)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.split()[:5] == ["flash,", "budget", "8MiB", "8.00", "MiB"] and "-" in line for line in lines)
    assert "The smallest that works is" in result.stdout
    (measured,) = (line.split() for line in lines if line.startswith("flash, budget 25%"))
    assert measured[4] == "MiB" and float(measured[5]) > 0
    nothing = bench(model, "--dram-budget", "8MiB", "--no-resident", "--repeats", 1, "-n", 3)
    assert nothing.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_no_group(number: signal.Signals, model: Path) -> None:
    controller = memory_controller()
    assert controller is not None
    command = [*BENCH, str(model), "--cap", "50%", "--repeats", "50", "-n", "100"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    pattern = f"llama-flash-{process.pid}-*"

    def groups() -> list[Path]:
        return [group for parent in controller.lineage() for group in parent.glob(pattern)]

    deadline = time.monotonic() + 200
    while not groups() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert groups()
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert groups() == []
