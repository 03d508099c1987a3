"""Status files of running processes, and the table that `llama-flash top` makes of them."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llama_flash.budget import status
from llama_flash.cli.top_view import Rates, table

_CHILD = """
import sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, verbose=False, flash_offload={"what": "experts"})
for i in range(10**6):
    if llm.n_tokens == 100:
        llm.reset()
    llm.eval([i % 100])
    print(i, flush=True)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_FLASH_RUNTIME", str(tmp_path / "run"))
    return tmp_path / "run"


def text_of(processes: list[dict[str, Any]], rates: Rates) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(processes, rates))
    return console.export_text()


def test_a_running_process_is_shown_and_gone_when_it_ends(place: Path, model_file: Any) -> None:
    path = model_file("qwen3moe", "Q4_0")
    child = subprocess.Popen([sys.executable, "-c", _CHILD, path], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        rates, seen = Rates(), set()
        for _ in child.stdout:
            for process in status.read_all():
                seen.add(process["written"])
                rates.of(process, 0)
            if len(seen) == 2:
                break
        (process,) = status.read_all()
        assert process["pid"] == child.pid
        (model,) = process["models"]
        assert model["path"] == str(path) and model["total"]["tokens"] > 0
        assert 0 < model["least"] <= model["granted"] <= model["most"]
        text = text_of([process], rates)
        assert path.name in text and str(child.pid) in text
        rate = rates.of(process, 0)
        assert rate is not None and rate > 0 and f"{rate:.1f}" in text
        run = subprocess.run(
            [sys.executable, "-m", "llama_flash", "top", "--json"], capture_output=True, text=True, check=True
        )
        assert json.loads(run.stdout)["processes"][0]["pid"] == child.pid
        run = subprocess.run([sys.executable, "-m", "llama_flash", "top"], capture_output=True, text=True, check=True)
        assert path.name in run.stdout, "not on a terminal: once"
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    finally:
        child.kill()
        child.wait()
    assert status.read_all() == [] and not list(place.glob("*.json")), "what a killed process left is removed"


def test_nobody_is_running(place: Path) -> None:
    assert "no process" in text_of(status.read_all(), Rates())


def test_files_that_are_not_ours_are_passed_over(place: Path) -> None:
    place.mkdir()
    (place / f"{os.getpid()}.json").write_text("{")
    (place / "notes.json").write_text("{}")
    (place / "1.json").write_text("[]")
    assert status.read_all() == []
    assert (place / "notes.json").exists()
