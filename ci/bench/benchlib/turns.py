"""Processes that have a model loaded and compute in turns: what the machine does meanwhile meets all of them alike."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from benchlib.child import Spec
from llama_flash.errors import FlashError

_TAKER = Path(__file__).with_name("taker.py")


class BuildError(FlashError):
    """A process could not load the model, or ended."""


def spec_file(folder: str, spec: Spec) -> Path:
    """A new file of `folder` that says what a process is to load."""
    handle, name = tempfile.mkstemp(".json", dir=folder)
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps(asdict(spec)))
    return Path(name)


class Taker:
    """A process that computes when it is told to."""

    def __init__(
        self, python: str, spec: Path, cap: int | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._python = python
        command = [python, str(_TAKER), str(spec)]
        if cap is not None:
            command = [sys.executable, "-m", "llama_flash", "cap", str(cap), "--", *command]
        # threads that never stop spinning would take a core from the others
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **inherited,
                "LLAMA_FLASH_WARM_START": "0",
                "PYTHONPATH": str(_TAKER.parents[1]),
                **(environment or {}),
            },
        )
        self._answer()

    @property
    def pid(self) -> int:
        """Of the process that computes, unless it is capped."""
        return self._process.pid

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

    def __enter__(self) -> Taker:
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
