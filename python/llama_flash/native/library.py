"""The plugin's shared library inside this process: loading and registering it, its errors as exceptions.

Imported by llama_cpp itself, so nothing here imports llama_cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, NoReturn

from ..errors import FlashError, FlashFormatError, FlashReadError
from . import bindings

__all__ = ["IO_ENGINES", "library", "note_settled", "raise_error", "register", "settled", "trim_heap"]

IO_ENGINES = {
    "auto": bindings.llama_flash_io_engine.LLAMA_FLASH_IO_AUTO,
    "io_uring": bindings.llama_flash_io_engine.LLAMA_FLASH_IO_URING,
    "pread": bindings.llama_flash_io_engine.LLAMA_FLASH_IO_PREAD,
}

_MOST_SETTLED = 16 << 20  # bytes: placement.py expects no more of the engine's heap

_settled = 0
_library: Any = None
_problem: str | None = "llama_cpp, with which the plugin is registered, has not been imported"


def register() -> None:
    """Adds the flash buffer type to the engine. Called once, when llama_cpp is imported, before any model is loaded.

    Never raises: without the plugin's library the engine works as stock, and `library` says what was wrong.
    """
    global _library, _problem
    if _library is not None:
        return
    try:
        loaded = bindings.load()
        code = loaded.llama_flash_register()
        if code != 0:
            _problem = f"the engine refused the flash buffer type (code {code})"
            return
    except (ImportError, OSError, AttributeError) as error:
        _problem = f"the plugin's library cannot be loaded: {error}"
        return
    _library, _problem = loaded, None


def library() -> Any:
    """The registered library (a ctypes.CDLL with the prototypes of llama_flash.h).

    Raises:
        FlashError: if there is none, with the reason.
    """
    if _library is None:
        raise FlashError(f"flash offload is not available: {_problem}")
    return _library


def raise_error(error: bindings.llama_flash_error) -> NoReturn:
    """Raises what a filled `struct llama_flash_error` says."""
    message = _text(error.message) or f"flash error {error.code}"
    if error.code == bindings.llama_flash_code.LLAMA_FLASH_E_READ:
        raise FlashReadError(
            message,
            file=_text(error.file),
            offset=error.offset,
            size=error.size,
            errno=error.sys_errno,
            tensor=_text(error.tensor),
        )
    if error.code == bindings.llama_flash_code.LLAMA_FLASH_E_FORMAT:
        raise FlashFormatError(message)
    raise FlashError(message)


def trim_heap() -> None:
    """Gives freed heap pages back to the kernel: glibc keeps up to 64 MiB after a load, which would be counted."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def settled() -> int:
    """Bytes of this process that its first use of the engine has taken for good: pages of libraries, heap.

    Estimates of what a load takes have them in: who adds one to what the process holds takes them off that.
    """
    return _settled


def note_settled(n_bytes: int) -> None:
    """n_bytes: by which the process has grown while the engine was used and everything was freed again."""
    global _settled
    _settled = min(_MOST_SETTLED, _settled + max(0, n_bytes))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")
