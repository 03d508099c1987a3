"""Warm start: which weights of a model were hot when it was last used, in a small file of the user's cache folder.

The folder is $LLAMA_FLASH_CACHE, else $XDG_CACHE_HOME/llama-flash, else ~/.cache/llama-flash; with LLAMA_FLASH_CACHE
set to nothing there is none. A file that is cut short, damaged, or of another version of the model is ignored with one
line in the log. Nothing depends on it: it only says what to read first.

Layout: one line of JSON (version, model, fingerprint, count, crc32), then the records' numbers as little-endian 64-bit
integers, the hottest first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Ids", "cache_folder", "fingerprint", "load", "save"]

logger = logging.getLogger("llama_flash")

Ids = npt.NDArray[np.uint64]

_VERSION = 1
_MOST = 1 << 22  # records of one file


def cache_folder() -> Path | None:
    """The user's cache folder for llama_flash; None: not wanted."""
    chosen = os.environ.get("LLAMA_FLASH_CACHE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llama-flash"


def fingerprint(files: Sequence[Path], layout: str) -> str:
    """Of the model's files as they are now, and of what numbers its records (`layout`)."""
    parts = []
    for file in files:
        stat = file.stat()
        parts.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps([parts, layout]).encode()).hexdigest()


def save(model: Path, mark: str, ids: Ids) -> Path | None:
    """Writes the file; returns where, None if it cannot be written: a cache is not worth failing for."""
    place = cache_folder()
    if place is None:
        return None
    path = _path(place, model)
    data = np.ascontiguousarray(ids[:_MOST], dtype="<u8").tobytes()
    header = {
        "version": _VERSION,
        "model": str(model.resolve()),
        "fingerprint": mark,
        "count": len(data) // 8,
        "crc32": zlib.crc32(data),
    }
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(json.dumps(header).encode() + b"\n" + data)
        part.replace(path)
    except OSError as error:
        logger.debug("the list of hot weights is not kept: %s", error)
        with contextlib.suppress(OSError):
            part.unlink()
        return None
    return path


def load(model: Path, mark: str) -> Ids:
    """The records that were hot; none where there is no file, or none that fits."""
    nothing: Ids = np.empty(0, np.uint64)
    place = cache_folder()
    if place is None:
        return nothing
    path = _path(place, model)
    try:
        head, _, data = path.read_bytes().partition(b"\n")
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
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("the list of hot weights in %s is ignored: %s", path, error)
        return nothing
    return np.frombuffer(data, "<u8").astype(np.uint64)


def _path(place: Path, model: Path) -> Path:
    name = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:16]
    return place / "hot" / f"{model.stem[:60]}-{name}.hot"
