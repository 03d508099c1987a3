"""`llama-flash`, as a process of its own or in the one of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from llama_flash.cli import main

FLASH = [sys.executable, "-m", "llama_flash"]

Flash = Callable[..., subprocess.CompletedProcess[str]]


def flash(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*FLASH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment})


def in_this_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Flash:
    """`flash` in this process: faster, for commands that need no engine."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["llama-flash", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(stopped.value.code or 0), out, err)

    return run
