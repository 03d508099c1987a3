"""How the build speaks: one line per error, and progress on everything that takes more than two seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

PROGRESS_SECONDS = 10.0  # between progress lines where the output is not a terminal
ERROR_PREFIX = "error: "


class BuildError(Exception):
    """The message is one line that says what is wrong and what to do."""


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs `main` and exits: 0, or 1 after one line on stderr."""
    try:
        main()
    except BuildError as e:
        print(f"{ERROR_PREFIX}{e}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def say(text: str) -> None:
    print(text, flush=True)


class _Step:
    """One line of progress: rewritten in place on a terminal, repeated now and then elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.detail = ""
        self.start = time.monotonic()
        self._tty = sys.stdout.isatty()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def _line(self) -> str:
        return f"{self.title} {self.detail}".rstrip() + f" ({time.monotonic() - self.start:.0f} s)"

    def _tick(self) -> None:
        while not self._done.wait(0.5 if self._tty else PROGRESS_SECONDS):
            say_end = "\r" if self._tty else "\n"
            print(self._line().ljust(79) if self._tty else self._line(), end=say_end, flush=True)

    def close(self, outcome: str) -> None:
        self._done.set()
        self._thread.join()
        seconds = time.monotonic() - self.start
        say(f"{self.title}: {outcome}, {seconds:.1f} s".ljust(79 if self._tty else 0))


@contextmanager
def step(title: str) -> Iterator[_Step]:
    progress = _Step(title)
    try:
        yield progress
    except BaseException:
        progress.close("failed")
        raise
    progress.close("done")


def _pump(stream: IO[str], log: IO[str], lines: list[str], progress: _Step, pattern: re.Pattern[str] | None) -> None:
    for line in stream:
        log.write(line)
        lines.append(line.rstrip())
        if pattern and (match := pattern.search(line)):
            progress.detail = match.group(0)


def run_logged(
    title: str,
    command: Sequence[str | Path],
    log: Path,
    *,
    explain: Callable[[list[str]], str],
    progress_pattern: str | None = None,
    env: Mapping[str, str] | None = None,
    **popen: Any,
) -> list[str]:
    """Runs a command with its output in `log` and a line of progress on stdout; returns its lines.

    On a non-zero exit raises BuildError with the line that `explain` makes of the output, and the log's path.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    pattern = re.compile(progress_pattern) if progress_pattern else None
    with step(title) as progress, log.open("w", encoding="utf-8") as out:
        with subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {})},
            **popen,
        ) as process:
            assert process.stdout is not None
            _pump(process.stdout, out, lines, progress, pattern)
        if process.returncode != 0:
            raise BuildError(f"{explain(lines)} (log: {log})")
    return lines
