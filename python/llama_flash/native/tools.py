"""The engine's tools inside this process: their library, whose function is that of plugin/server/tools.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from ..errors import FlashError
from .server import Driver, argv_of, hooks_of, shipped

__all__ = ["run_tool"]

_LIBRARY = "libllama-tools.so"


def run_tool(name: str, arguments: Sequence[str], driver: Driver) -> int:
    """Runs a tool in this thread, as if it were the whole process: some of its options and errors end that.

    Args:
        name: of the program: llama-perplexity.
        arguments: as on its command line, without its name.

    Returns:
        Its exit status.

    Raises:
        FlashError: the tools' library is missing.
        ValueError: there is no such tool.
    """
    library = _library()
    hooks = hooks_of(driver)
    status: int = library.llama_flash_tool(*argv_of(name, arguments), ctypes.byref(hooks))
    if status < 0:
        raise ValueError(f"there is no tool {name}")
    return status


def _library() -> Any:
    try:
        library = shipped(_LIBRARY)
        library.llama_flash_tool.restype = ctypes.c_int
        library.llama_flash_tool.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    except (OSError, AttributeError) as error:
        raise FlashError(f"the tools' library cannot be loaded: {error}") from None
    return library
