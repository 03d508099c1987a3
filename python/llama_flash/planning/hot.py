"""Warm start: which weights of a model were hot when it was last used, in a small file of the user's cache folder.

A file that is cut short, damaged, or of another version of the model is ignored with one line in the log. Nothing
depends on it: it only says what to read first. The model's own folder is never written to.

Layout: one line of JSON (version, model, fingerprint, count, crc32), then the records' numbers as little-endian 64-bit
integers, the hottest first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..kept_files import cache_folder, fingerprint, keep, name_for, read_kept, warm_start_wanted
from ..native.handle import Session
from ..options import FlashOffload

__all__ = ["Ids", "Records", "load", "save"]

logger = logging.getLogger("llama_flash")

Ids = npt.NDArray[np.uint64]

_VERSION = 1
_MOST = 1 << 22  # records of one file
_AT_ONCE = 4096  # records that are asked for in one step


class Records:
    """The hot records of a model's files. Nothing is kept or read where the options or the environment say no.

    Args:
        files: of the model.
        layout: what numbers the records.
    """

    def __init__(self, files: Sequence[Path], options: FlashOffload, layout: str) -> None:
        self._files, self._options, self._layout = files, options, layout
        self._mark = ""
        self.left: Ids | None = None  # to be read in the background; None: not yet looked for

    @property
    def wanted(self) -> bool:
        return self._options.warm_start and warm_start_wanted()

    def note_files(self) -> None:
        """Which version of the files was loaded."""
        with contextlib.suppress(OSError):  # the file is gone already
            self._mark = fingerprint(self._files, self._layout)

    def warm(self, native: Session) -> bool:
        """Reads a few of the records that were hot when the model was last used; False: nothing is left to read."""
        if not self.wanted:
            return False
        if self.left is None:
            self.left = self.load(native)
        if not len(self.left):
            return False
        done = native.warm(self.left[:_AT_ONCE])
        self.left = self.left[done:]
        return len(self.left) > 0

    def store(self, native: Session) -> None:
        """Remembers what is in slots."""
        if not self.wanted or not len(ids := native.hot()):
            return
        with contextlib.suppress(OSError):  # the model is gone
            self._mark = self._mark or fingerprint(self._files, self._layout)
            self.save(native, np.asarray(ids))

    def load(self, native: Session) -> Ids:
        """What was kept, as the session numbers it."""
        return load(self._files[0], self._mark)

    def save(self, native: Session, ids: Ids) -> None:
        """ids: as the session numbers them, the hottest first."""
        save(self._files[0], self._mark, ids)


def save(model: Path, mark: str, ids: Ids, part: str = "") -> Path | None:
    """Writes the file; returns where, None if it cannot be written: a cache is not worth failing for.

    part: what of the model the numbers are of; "": all of it, as a session has it.
    """
    path = _path(model, part)
    data = np.ascontiguousarray(ids[:_MOST], dtype="<u8").tobytes()
    header = {
        "version": _VERSION,
        "model": str(model.resolve()),
        "fingerprint": mark,
        "count": len(data) // 8,
        "crc32": zlib.crc32(data),
    }
    try:
        keep(path, json.dumps(header).encode() + b"\n" + data)
    except OSError as error:
        logger.debug("the list of hot weights is not kept: %s", error)
        return None
    return path


def load(model: Path, mark: str, part: str = "") -> Ids:
    """The records that were hot; none where there is no file, or none that fits."""
    nothing: Ids = np.empty(0, np.uint64)
    path = _path(model, part)
    try:
        head, _, data = read_kept(path).partition(b"\n")
    except FileNotFoundError:
        return nothing
    except OSError as error:
        logger.warning("the list of hot weights is ignored: %s", error)
        return nothing
    try:
        header = json.loads(head)
        if header["version"] != _VERSION or header["fingerprint"] != mark:
            raise ValueError("it is of another version of the model, or of other options")
        if len(data) != 8 * header["count"] or zlib.crc32(data) != header["crc32"]:
            raise ValueError("it is damaged")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("the list of hot weights in %s is ignored: %s", path, error)
        return nothing
    return np.frombuffer(data, "<u8").astype(np.uint64)


def _path(model: Path, part: str) -> Path:
    return cache_folder() / "hot" / name_for(model, "hot", part)
