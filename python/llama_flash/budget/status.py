"""What running processes say of themselves: one JSON file per process, for `llama-flash top`.

They lie in $LLAMA_FLASH_RUNTIME, else in $XDG_RUNTIME_DIR/llama-flash, else in a folder of the user's own below the
folder for temporary files. They are written every two seconds, and are gone when the process ends; what a process
that was killed has left behind is removed by whoever reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .rooms import Room, held_by_process

__all__ = ["StatusFile", "folder", "read_all"]


_KEYS = {"pid", "command", "written", "held", "room", "limited_by", "models"}
_STALE = 60.0  # seconds without a word from a process: its number is another's now


def folder() -> Path:
    """Where the status files of this user's processes lie."""
    if chosen := os.environ.get("LLAMA_FLASH_RUNTIME"):
        return Path(chosen)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "llama-flash"
    return Path(tempfile.gettempdir()) / f"llama-flash-{os.getuid()}"


class StatusFile:
    """The file of this process. Problems with it never reach the caller: it is not worth failing for."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._pid = 0
        self._started = time.time()

    def write(self, models: list[dict[str, object]], tightest: Room, pressure: float | None) -> None:
        """Args:
        tightest: what limits the process most.
        pressure: seconds since the kernel last found it hard to free memory; None: it did not.
        """
        with contextlib.suppress(OSError):
            if self._path is None:
                place = folder()
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
                if not _ours(place):
                    return  # they could read or replace it
                self._path, self._pid = place / f"{os.getpid()}.json", os.getpid()
            text = json.dumps(
                {
                    "pid": os.getpid(),
                    "command": _command(),
                    "started": self._started,
                    "written": time.time(),
                    "held": held_by_process(),
                    "room": tightest.bytes,
                    "limit": tightest.limit,
                    "limited_by": tightest.name,
                    "pressure": pressure,
                    "models": models,
                }
            )
            part = self._path.with_suffix(".part")
            part.write_text(text)
            part.replace(self._path)

    def remove(self) -> None:
        if self._path is not None and self._pid == os.getpid():  # a child's copy is its parent's
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._path = None


def _command() -> str:
    """The program, not its arguments: there may be a secret among them."""
    name = Path(sys.argv[0]).name
    return " ".join([name, *sys.argv[1:2]]) if name == "llama-flash" else name


def _ours(place: Path) -> bool:
    found = place.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def read_all(place: Path | None = None) -> list[dict[str, Any]]:
    """The status of each process that runs, by process number."""
    place = place or folder()
    found = []
    with contextlib.suppress(OSError):
        if not _ours(place):
            return []
    for path in sorted(place.glob("*.json")):
        if not path.stem.isdigit():
            continue
        try:
            status = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # just being replaced, or not ours
        if not isinstance(status, dict) or not status.keys() >= _KEYS or status["pid"] != int(path.stem):
            continue
        if Path(f"/proc/{path.stem}").exists() and time.time() - status["written"] < _STALE:
            found.append(status)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return sorted(found, key=lambda status: int(status["pid"]))
