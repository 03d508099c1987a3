"""The errors of llama_flash: one family, so that `except FlashError` catches all of it.

They derive from RuntimeError because that is what llama_cpp raises when a decode fails.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

__all__ = [
    "FlashBudgetError",
    "FlashCapError",
    "FlashCpuError",
    "FlashError",
    "FlashFormatError",
    "FlashReadError",
    "FlashWorkerError",
]


class FlashError(RuntimeError):
    """Anything that goes wrong in llama_flash."""


class FlashBudgetError(FlashError):
    """The DRAM budget does not hold what must stay in memory.

    Attributes:
        breakdown: bytes by part (interpreter, weights, kv, compute, outputs, reserve, flash).
        smallest: the smallest budget that works, in bytes.
        advice: sentences of the message on what cannot leave memory and what would need less.
    """

    def __init__(
        self, message: str, *, breakdown: Mapping[str, int], smallest: int, advice: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.breakdown: dict[str, int] = dict(breakdown)
        self.smallest = smallest
        self.advice = tuple(advice)


class FlashReadError(FlashError):
    """A read from flash failed, came up short, or met a file that changed since it was loaded.

    The decode that needed the bytes has failed; the model can be used again if the fault was transient.

    Attributes:
        file: path of the GGUF file.
        offset: where the read began, in bytes from the start of the file.
        size: bytes asked for.
        errno: errno of the failed call, 0 if there was none (a short file, say).
        tensor: name of the weight that was being read, "" if not known.
    """

    def __init__(
        self, message: str, *, file: str = "", offset: int = 0, size: int = 0, errno: int = 0, tensor: str = ""
    ) -> None:
        super().__init__(message)
        self.file = file
        self.offset = offset
        self.size = size
        self.errno = errno
        self.tensor = tensor


class FlashWorkerError(FlashError):
    """A worker cannot be used, or was lost.

    What was computed since the call before is void. A model whose worker was lost has to be loaded again.

    Attributes:
        host: the worker, "host:port"; "" if it is about all of them.
        is_away: it was lost, cannot be reached or is busy, which may be over after a while. Else somebody has to mend
            something: it has another model, say.
    """

    def __init__(self, message: str, *, host: str = "", is_away: bool = False) -> None:
        super().__init__(message)
        self.host, self.is_away = host, is_away


class FlashFormatError(FlashError, ValueError):
    """A file that cannot be loaded: not a GGUF file, damaged, contradicting itself, or not a model for this engine.

    Also a ValueError, which is what llama_cpp raises for a model that it cannot load.

    Attributes:
        problem: what is wrong, with the file, and the key or tensor where it is known.
        mend: what to do about it, "" if nothing is known that helps.
        said: `problem` without the names of file, key and tensor.
        file: the file's path, "" where `problem` alone has it.
        key: the key that it is about, "" if none.
        tensor: name of the tensor that it is about, "" if none.
    """

    def __init__(
        self, said: str, *, mend: str = "", file: str | os.PathLike[str] = "", key: str = "", tensor: str = ""
    ) -> None:
        names = (f"tensor {tensor} " if tensor else "") + (f"key {key} " if key else "")
        problem = f"{os.fspath(file)}: {names}{said}" if os.fspath(file) else f"{names}{said}"
        super().__init__(f"{problem}; {mend}" if mend else problem)
        self.problem = problem
        self.mend = mend
        self.said = said
        self.file = os.fspath(file)
        self.key = key
        self.tensor = tensor


class FlashCapError(FlashError):
    """A command could not be run under a memory cap."""


class FlashCpuError(FlashError, ImportError):
    """llama_cpp was compiled for instruction sets that this CPU does not have; raised when it is imported."""
