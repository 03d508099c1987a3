"""Files that are there as a whole or not at all: written beside their place, under a name of their own, then moved.

A process that is killed leaves what it had begun. Whoever writes to the same place next removes that, and says so; what
another process is writing at that time is locked by it (flock), and stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .sizes import format_size

__all__ = ["remove_abandoned", "remove_all_abandoned", "temporary_folder", "whole_file"]

logger = logging.getLogger("llama_flash")

_MARK = r"\.[0-9a-f]{8}\.partial"
_LONGEST_NAME = 200  # bytes that the name of the place may contribute: 255 is what file systems allow

Say = Callable[[str], object]


@contextlib.contextmanager
def whole_file(path: Path, *, before: Callable[[], object] | None = None, say: Say | None = None) -> Iterator[BinaryIO]:
    """A file to be written that takes the place of `path` when the `with` statement ends without error.

    Args:
        before: called when all is on the disk, before the file takes its place; what it raises is raised.
        say: told what was removed; None: a warning in the log.

    Raises:
        OSError: it cannot be written.
    """
    remove_abandoned(path, say)
    partial, lock = _new_name(path), -1
    try:  # a Ctrl-C may come as soon as the file is there
        lock = _begin(partial, lambda: os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        with partial.open("wb") as file:
            yield file
        os.fsync(lock)
        if before is not None:
            before()
        partial.replace(path)
    finally:
        # with the lock: once it is released, the name may be somebody else's
        partial.unlink(missing_ok=True)
        if lock >= 0:
            os.close(lock)


@contextlib.contextmanager
def temporary_folder(path: Path, *, say: Say | None = None) -> Iterator[Path]:
    """A folder beside `path` for what is needed until that is written; removed at the end.

    Raises OSError as `whole_file` does.
    """
    remove_abandoned(path, say)

    folder, lock = _new_name(path), -1

    def make() -> int:
        folder.mkdir(mode=0o700)
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    try:
        lock = _begin(folder, make)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def remove_abandoned(path: Path, say: Say | None = None) -> None:
    """Removes what processes that were killed have left of `path`. What cannot be removed stays."""
    _remove_named(path.parent, f"\\.{re.escape(_stem(path))}", say)


def remove_all_abandoned(folder: Path, names: str, say: Say | None = None) -> None:
    """The same for all files of a folder; names: a regular expression of what they would be called."""
    _remove_named(folder, rf"\.(?:{names})", say)


def _remove_named(folder: Path, begin: str, say: Say | None) -> None:
    name = re.compile(begin + _MARK, re.DOTALL)
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if name.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove(Path(entry.path), say)


def _remove(left: Path, say: Say | None) -> None:
    lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(lock)
        if stat.S_ISDIR(found.st_mode):
            size = sum(file.lstat().st_size for file in left.rglob("*"))
            shutil.rmtree(left)
        elif stat.S_ISREG(found.st_mode):
            size = found.st_size
            left.unlink()
        else:
            return
    finally:
        os.close(lock)
    (say or logger.warning)(f"removed {left} ({format_size(size)}), which a run that was killed had left unfinished")


def _new_name(path: Path) -> Path:
    return path.with_name(f".{_stem(path)}.{secrets.token_hex(4)}.partial")


def _begin(name: Path, make: Callable[[], int]) -> int:
    """Makes what is to be called so; returns the descriptor that keeps it locked."""
    while True:
        lock = make()
        try:
            with contextlib.suppress(OSError):  # a file system without locks: there, files without one are not removed
                fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a process that takes it for left behind, and removes it
            # between its creation and its lock it may have been
            if os.path.samestat(os.stat(name), os.fstat(lock)):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _stem(path: Path) -> str:
    name = os.fsencode(path.name)
    return os.fsdecode(name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME])
