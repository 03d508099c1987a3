"""What is kept between runs: small files in the user's cache folder, each a help that nothing depends on.

They are bounded: of each kind the `MOST` that were used last, and none that was not used for `LONGEST`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .whole_files import remove_all_abandoned, whole_file

__all__ = [
    "LONGEST",
    "MOST",
    "cache_folder",
    "fingerprint",
    "in_turn",
    "keep",
    "name_for",
    "read_kept",
    "warm_start_wanted",
]

logger = logging.getLogger("llama_flash")

MOST = 64  # files of a kind: of models or devices
LONGEST = 180 * 24 * 3600.0  # seconds since the last use

# names of the files of a kind begin as they like: with the model's name, say. The folder may hold others'.
_NAMES = r".*-[0-9a-f]{16}"


def cache_folder() -> Path:
    """$LLAMA_FLASH_CACHE, else llama-flash in $XDG_CACHE_HOME, else in ~/.cache."""
    if named := os.environ.get("LLAMA_FLASH_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # others are to be ignored, says the XDG specification
        return Path(base, "llama-flash")
    return Path(os.path.expanduser("~"), ".cache", "llama-flash")


def warm_start_wanted() -> bool:
    """Whether the environment allows a warm start: LLAMA_FLASH_WARM_START=0 does not."""
    return os.environ.get("LLAMA_FLASH_WARM_START", "1") != "0"


def fingerprint(files: Sequence[Path], layout: str) -> str:
    """Of the model's files as they are now, and of what numbers its records (`layout`)."""
    parts = []
    for file in files:
        stat = file.stat()
        parts.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps([parts, layout]).encode()).hexdigest()


def name_for(model: Path, ending: str, part: str = "") -> str:
    """Of what is kept for the model, or for a part of it: to be told apart, and to be recognised."""
    mark = hashlib.sha256(f"{model.resolve()}{part}".encode()).hexdigest()[:16]
    return f"{model.stem[:60]}-{mark}.{ending}"


def keep(path: Path, content: bytes) -> None:
    """Writes a file so that readers see the one before or this one, and removes what is too much or too old beside it.

    Raises OSError; nothing is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, say=logger.debug) as file:
        file.write(content)
    _forget(path)


@contextlib.contextmanager
def in_turn(kind: str) -> Iterator[None]:
    """While this lasts, no other process is here for the same kind: for files that are read, changed and kept.

    Raises OSError where the folder cannot be made or opened.
    """
    folder = cache_folder() / kind
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def read_kept(path: Path) -> bytes:
    """The content, which counts as a use of the file. Raises OSError."""
    content = path.read_bytes()
    with contextlib.suppress(OSError):  # somebody else's, or a read-only file system
        os.utime(path)
    return content


def _forget(written: Path) -> None:
    """Of the kind that was just written: all whose names end as this one's do. What cannot be removed stays."""
    names = _NAMES + re.escape(written.suffix)
    remove_all_abandoned(written.parent, names, say=logger.debug)
    with contextlib.suppress(OSError):
        used = []
        for entry in list(os.scandir(written.parent)):
            if re.fullmatch(names, entry.name, re.DOTALL) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    used.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
        used.sort(reverse=True)
        oldest = time.time() - LONGEST
        for number, (last, name) in enumerate(used):
            if (number >= MOST or last < oldest) and name != str(written):
                with contextlib.suppress(OSError):
                    os.unlink(name)
                    logger.debug("%s is forgotten", name)
