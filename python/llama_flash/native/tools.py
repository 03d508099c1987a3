"""The engine's tools inside this process: their library, whose function is that of plugin/server/tools.cpp."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

from ..errors import FlashError
from . import bindings
from .server import Driver, hooks_of

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
    encoded = [name.encode(), *map(os.fsencode, arguments)]
    argv = (ctypes.c_char_p * (len(encoded) + 1))(*encoded, None)
    hooks = hooks_of(driver)
    status: int = library.llama_flash_tool(len(encoded), argv, ctypes.byref(hooks))
    if status < 0:
        raise ValueError(f"there is no tool {name}")
    return status


def _library() -> Any:
    path = bindings.library_path().with_name(_LIBRARY)
    import llama_cpp  # noqa: F401  # its libllama is the one that the tools are to find in the process

    try:
        library = ctypes.CDLL(str(path))
        library.llama_flash_tool.restype = ctypes.c_int
        library.llama_flash_tool.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    except (OSError, AttributeError) as error:
        raise FlashError(f"the tools' library cannot be loaded: {error}") from None
    return library
