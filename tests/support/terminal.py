"""A program on a real pseudo-terminal: what it writes is read as text, without the codes that move and colour it."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_CODES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[78=>]|\x1b\][^\x07]*\x07")


class Terminal:
    """A process whose terminal we are."""

    def __init__(
        self, command: Sequence[str | Path], *, width: int = 100, height: int = 40, env: Mapping[str, str] | None = None
    ) -> None:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_terminal,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width), **(env or {})},
        )
        os.close(theirs)
        self._file = ours
        self.raw = ""

    @property
    def text(self) -> str:
        """All that was written, also what was overwritten since."""
        return _CODES.sub("", self.raw).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait_for(self, pattern: str, *, after: int = 0, seconds: float = 200) -> int:
        """Where the text from `after` on that matches ends. AssertionError if it does not come."""
        deadline = time.monotonic() + seconds
        while True:
            if match := re.compile(pattern).search(self.text, after):
                return match.end()
            left = deadline - time.monotonic()
            assert left > 0 and self._read(left), f"{pattern!r} did not come; after {after}: {self.text[after:]!r}"

    def press(self, key: str, pattern: str, *, after: int = 0) -> int:
        """Presses a key until the text matches, and returns as `wait_for`.

        A control key that comes in the moment in which a line editor takes the terminal over can be lost. What was
        typed before must have been echoed: a Ctrl-C also drops what the program has not read yet, and a line editor
        that was just told of it then waits for the next key, whatever signals come.
        """
        for _ in range(20):
            self.type(key)
            try:
                return self.wait_for(pattern, after=after, seconds=10)
            except AssertionError:
                continue
        return self.wait_for(pattern, after=after, seconds=10)

    def leave(self, key: str) -> int:
        """Presses a key until the program ends; its exit code."""
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            try:
                self.type(key)
                return self.end(10)
            except (OSError, subprocess.TimeoutExpired):
                if self.process.poll() is not None:
                    break
        return self.process.wait(timeout=1)

    def end(self, seconds: float = 200) -> int:
        """The exit code, when all was read."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(timeout=max(1, deadline - time.monotonic()))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._file)

    def _read(self, seconds: float) -> bool:
        """Whether there was something to read, or may be."""
        if seconds <= 0 or not select.select([self._file], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._file, 1 << 16)
        except OSError:  # the last process has closed it
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)
