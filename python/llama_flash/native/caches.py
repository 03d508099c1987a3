"""Where a context's caches lie, and how much of them has been touched."""

from __future__ import annotations

import ctypes
from typing import Any

from . import bindings
from .library import library

__all__ = ["AtOnce"]


class AtOnce:
    """The part of a context's caches of which a sequence's first token touches all that is its own.

    May be asked by any thread; after the context is gone, what it says means nothing.
    """

    def __init__(self, areas: Any) -> None:
        self._areas = areas
        self.bytes = sum(int(area.size) for area in areas)

    @classmethod
    def of(cls, context: Any) -> AtOnce | None:
        """context: llama_context pointer. None: caches of a kind of which that is not known."""
        n, error = ctypes.c_uint32(), bindings.llama_flash_error()
        for _ in range(2):  # how many there are is known after the first call
            areas = (bindings.llama_flash_area * n.value)()
            code = library().llama_flash_kv_areas(context, areas, len(areas), ctypes.byref(n), ctypes.byref(error))
            if code != 0:
                return None
        chosen = [area for area in areas if area.at_once]
        return cls((bindings.llama_flash_area * len(chosen))(*chosen))

    def untouched(self) -> int:
        """Bytes."""
        return max(0, self.bytes - int(library().llama_flash_touched(self._areas, len(self._areas))))
