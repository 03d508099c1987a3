"""Files of plain arrays, .npz without pickled objects: what traces and snapshots are kept in."""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .file_kind import kind_of_file
from .whole_files import whole_file

__all__ = ["check_target", "open_archive", "write_archive"]

_DAMAGED = (
    *(AttributeError, EOFError, KeyError, NotImplementedError, TypeError, ValueError),
    *(zipfile.BadZipFile, zlib.error),
)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises, before work is done for it, what `write_archive` would raise: OSError."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory")
    if target.exists() and not target.is_file():  # a pipe, a device
        return
    try:
        tempfile.TemporaryFile(dir=target.resolve().parent).close()
    except OSError as error:
        raise type(error)(f"{target} cannot be written: {error.strerror or error}") from None


def write_archive(path: str | os.PathLike[str], **arrays: Any) -> None:
    """Writes the file as a whole, or not at all. Raises OSError."""
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        with target.open("wb") as file:  # savez would add a suffix of its own to a name
            np.savez_compressed(file, **arrays)
        return
    with whole_file(target) as file:
        np.savez_compressed(file, **arrays)


@contextmanager
def open_archive(path: str | os.PathLike[str], what: str) -> Iterator[Any]:
    """The arrays by name. what: is to be found in the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not `what`, also if that shows in the `with` statement.
    """
    if kind := kind_of_file(path):  # opening a pipe would wait for its writer
        raise ValueError(f"{os.fspath(path)} is {kind}, not {what} of llama-flash")
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except _DAMAGED as error:
        raise ValueError(f"{os.fspath(path)} is not {what} of llama-flash: {' '.join(str(error).split())}") from None
