"""Which build of the engine this is."""

from __future__ import annotations

import hashlib
from functools import cache

from . import bindings

__all__ = ["build_mark"]

_LIBRARIES = ("libllama.so*", "libggml*.so*", "libllama_flash.so*")


@cache
def build_mark() -> str:
    """A hash of the engine's libraries: another build may compute other bits."""
    folder, mark = bindings.library_path().parent, hashlib.sha256()
    for path in sorted({found.resolve() for name in _LIBRARIES for found in folder.glob(name)}):
        mark.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                mark.update(piece)
    return mark.hexdigest()
