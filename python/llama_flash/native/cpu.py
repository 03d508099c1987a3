"""Whether this CPU can run the libraries beside llama_cpp: asked before they are loaded.

Without it, a wheel that was compiled for a newer CPU would end the process with an illegal instruction. Imported by
llama_cpp itself, so nothing here imports llama_cpp.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from ..errors import FlashCpuError

__all__ = ["check", "needed"]


# what the portable wheel needs, by machine (ci/engine/CMakeLists.txt)
_PORTABLE = {"x86_64": "AVX2, FMA, F16C and BMI2", "aarch64": "LSE, RDM and DOTPROD (Armv8.2)"}


def check(folder: Path) -> None:
    """Raises FlashCpuError if the libraries in `folder` (or in LLAMA_CPP_LIB_PATH) need what this CPU does not have."""
    if missing := _names("llama_flash_cpu_missing", folder):
        portable = _PORTABLE.get(platform.machine())
        instead = f", or where there are {portable} install the portable wheel (`make wheel`)" if portable else ""
        raise FlashCpuError(
            f"this CPU has no {missing}, for which this llama_cpp was compiled: "
            f"build it on this machine (`make build`){instead}"
        )


def needed(folder: Path) -> str:
    """The instruction sets that the libraries were compiled for, separated by commas; "" where nothing says so."""
    return _names("llama_flash_cpu_needed", folder)


def _names(function: str, folder: Path) -> str:
    path = Path(os.environ.get("LLAMA_CPP_LIB_PATH", folder)) / "libllama_flash_cpu.so"
    if not path.is_file():  # libraries of another build: llama_cpp says itself what it cannot load
        return ""
    text = ctypes.create_string_buffer(1024)
    getattr(ctypes.CDLL(str(path)), function)(text, ctypes.c_size_t(len(text)))
    return text.value.decode()
