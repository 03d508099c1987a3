"""The folder of blocks: one file for each part of each block, named by a hash.

Every file is reached from the folder's descriptor, by a name that was made here, and never through a link. A file that
is not the user's own, not a regular one, on another device or writable by others is as if it were not there.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Entry", "Folder", "FolderError"]

_NAME = re.compile(r"[0-9a-f]{64}\.(?:cells|window|state)")
_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")
_ABANDONED = 600.0  # seconds: a file that nobody has written to for so long was left behind by a process that ended
_MOST_ENTRIES = 1 << 20  # that are looked at: a folder with more is somebody else's
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class FolderError(OSError):
    """The folder cannot be used, and why."""


@dataclass(frozen=True)
class Entry:
    """A file of the folder."""

    name: str
    size: int  # bytes on the disk
    used: float  # seconds since the epoch
    length: int  # bytes


class Folder:
    """A folder that belongs to this user alone.

    Raises:
        FolderError: it cannot be made or opened, or others may read or write it.
    """

    def __init__(self, path: Path, make: bool = True) -> None:
        self.path = path
        self._fd = -1
        try:
            if make:
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    path.mkdir(mode=0o700)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise FolderError(f"{path}: {error.strerror}") from None
        found = os.fstat(self._fd)
        self._device = found.st_dev
        if found.st_uid != os.geteuid():
            self.close()
            raise FolderError(f"{path}: belongs to another user")
        if found.st_mode & 0o077:
            self.close()
            raise FolderError(f"{path}: others may look into it, and prompts are private: chmod 700 {path}")

    def close(self) -> None:
        """May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def open(self, name: str) -> int | None:
        """A descriptor for reads; None: there is no such file, or none to be trusted."""
        try:
            fd = os.open(name, os.O_RDONLY | _SAFE, dir_fd=self._fd)
        except OSError:
            return None
        if self._is_ours(os.fstat(fd)):
            return fd
        os.close(fd)
        return None

    def holds(self, name: str) -> bool:
        """Whether there is such a file, to be trusted as far as that can be seen from outside."""
        try:
            return self._is_ours(os.stat(name, dir_fd=self._fd, follow_symlinks=False))
        except OSError:
            return False

    def begin(self) -> tuple[str, int]:
        """Name and descriptor of a file that is to be written. Raises OSError."""
        name = f".{secrets.token_hex(8)}.partial"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE
        try:
            return name, os.open(name, flags | os.O_DIRECT, 0o600, dir_fd=self._fd)
        except OSError:  # a file system without direct writes
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._fd)
            return name, os.open(name, flags, 0o600, dir_fd=self._fd)

    def finish(self, partial: str, name: str) -> None:
        """Gives the file its name, in place of another one. Raises OSError."""
        os.rename(partial, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """What cannot be removed stays."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._fd)

    def touch(self, name: str, when: float) -> None:
        """The file was used."""
        with contextlib.suppress(OSError):
            os.utime(name, (when, when), dir_fd=self._fd, follow_symlinks=False)

    def entries(self) -> Iterator[Entry]:
        """The files with names of ours. What processes that ended have left is removed. Raises OSError."""
        for number, found in enumerate(os.scandir(self._fd)):
            if number >= _MOST_ENTRIES:
                raise FolderError(f"{self.path}: more than {_MOST_ENTRIES} files")
            ours = _NAME.fullmatch(found.name) is not None
            if not ours and not _PARTIAL.fullmatch(found.name):
                continue
            try:
                about = found.stat(follow_symlinks=False)
            except OSError:
                continue
            if ours and self._is_ours(about):
                yield Entry(found.name, about.st_blocks * 512, about.st_mtime, about.st_size)
            elif not ours and about.st_mtime < time.time() - _ABANDONED:
                self.remove(found.name)

    def evict(self, limit: int, room: int = 0) -> int:
        """Removes what was used longest ago, until `room` more bytes fit into the limit. Returns the bytes left.

        Raises OSError.
        """
        found = sorted(self.entries(), key=lambda entry: entry.used, reverse=True)
        total = sum(entry.size for entry in found)
        if total + room <= limit:
            return total
        goal = limit - limit // 10  # a tenth more, so as not to look at all files again soon
        while found and total + room > goal:
            entry = found.pop()
            self.remove(entry.name)
            total -= entry.size
        return total

    def _is_ours(self, about: os.stat_result) -> bool:
        return (
            stat.S_ISREG(about.st_mode)
            and about.st_uid == os.geteuid()
            and about.st_dev == self._device
            and not about.st_mode & 0o022
        )
