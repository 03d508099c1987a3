"""Warm start: which weights of a model were hot when it was last used, in a small file of the user's cache folder.

A file that is cut short, damaged, or of another version of the model is ignored with one line in the log. Nothing
depends on it: it only says what to read first. The model's own folder is never written to.

Layout: one line of JSON (version, model, fingerprint, count, crc32), then the records' numbers as little-endian 64-bit
integers, the hottest first.
"""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..kept_files import cache_folder, keep, name_for, read_kept

__all__ = ["Ids", "load", "save"]

logger = logging.getLogger("llama_flash")

Ids = npt.NDArray[np.uint64]

_VERSION = 1
_MOST = 1 << 22  # records of one file


def save(model: Path, mark: str, ids: Ids) -> Path | None:
    """Writes the file; returns where, None if it cannot be written: a cache is not worth failing for."""
    path = _path(model)
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


def load(model: Path, mark: str) -> Ids:
    """The records that were hot; none where there is no file, or none that fits."""
    nothing: Ids = np.empty(0, np.uint64)
    path = _path(model)
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
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("the list of hot weights in %s is ignored: %s", path, error)
        return nothing
    return np.frombuffer(data, "<u8").astype(np.uint64)


def _path(model: Path) -> Path:
    return cache_folder() / "hot" / name_for(model, "hot")
