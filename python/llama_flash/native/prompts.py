"""States of prompts in an engine's context: copied out piece by piece, and read back from files.

What takes a context belongs to the thread that computes with it, or to one that knows that nobody does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FlashError
from . import bindings
from .library import IO_ENGINES, library, raise_error

__all__ = [
    *("HEAD_BYTES", "NotThere", "PromptKind", "Tokens"),
    *("checksum", "clear", "copy", "kind_of", "restore", "set_state", "state_of", "take"),
]

HEAD_BYTES = 4096
Tokens = npt.NDArray[np.int32]

_PARTIAL = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


class NotThere(FlashError):
    """The positions asked for are not in memory."""


@dataclass(frozen=True)
class PromptKind:
    """What the state of a sequence consists of."""

    supported: bool
    has_cells: bool  # of all positions
    window: int  # cells of so many positions before the next one; 0: none
    has_state: bool  # without cells: recurrent

    @property
    def has_rests(self) -> bool:
        """Whether what is behind the last whole block of a text can be kept: there is nothing but its cells."""
        return self.has_cells and not self.window and not self.has_state


def kind_of(context: Any) -> PromptKind:
    """context: llama_context pointer. Raises FlashError."""
    kind, error = bindings.llama_flash_prompt_kind(), bindings.llama_flash_error()
    if library().llama_flash_prompt_kind_of(context, 0, ctypes.byref(kind), ctypes.byref(error)) != 0:
        raise_error(error)
    return PromptKind(bool(kind.supported), bool(kind.has_cells), int(kind.window), bool(kind.has_state))


def take(
    context: Any, seq: int, window: bool, positions: tuple[int, int], offset: int, buffer: memoryview
) -> tuple[int, int, int]:
    """Copies what is at `offset` of the state of positions (from, to) into the buffer, as much as fits.

    Returns:
        Bytes copied, bytes of all of the state, and the sum of these bytes' checksum.

    Raises:
        NotThere: not all positions are in memory.
    """
    total = _call_take(context, seq, window, positions, offset, 0, None)[0]
    n = max(0, min(len(buffer), total - offset))
    address = ctypes.addressof(ctypes.c_uint8.from_buffer(buffer))
    return n, *_call_take(context, seq, window, positions, offset, n, address)


def _call_take(
    context: Any, seq: int, window: bool, positions: tuple[int, int], offset: int, n: int, to: int | None
) -> tuple[int, int]:
    total, checked, error = ctypes.c_uint64(), ctypes.c_uint32(), bindings.llama_flash_error()
    where = ctypes.cast(to, ctypes.POINTER(ctypes.c_uint8)) if to else None
    code = library().llama_flash_prompt_take(
        *(context, seq, window, *positions, offset if n else 0, n, where),
        *(ctypes.byref(total), ctypes.byref(checked), ctypes.byref(error)),
    )
    if code == bindings.llama_flash_code.LLAMA_FLASH_E_INVALID:
        raise NotThere(error.message.decode(errors="replace"))
    if code != 0:
        raise_error(error)
    return total.value, checked.value


def restore(
    context: Any,
    seq: int,
    window: bool,
    first: int,
    tokens: Tokens,
    block: int,
    files: Sequence[tuple[int, bytes]],
    io_engine: str = "auto",
) -> int:
    """Reads blocks of `block` tokens from files into the sequence, from position `first` on.

    Args:
        tokens: of positions `first` on, as many as the blocks have.
        files: descriptor of each, and the head that it must have.

    Returns:
        How many of the first blocks are whole and right. The sequence has these and none behind them.

    Raises:
        FlashError: there is no room.
    """
    heads = [ctypes.create_string_buffer(head, HEAD_BYTES) for _, head in files]
    array = (bindings.llama_flash_prompt_block * len(files))()
    for entry, (descriptor, _), head in zip(array, files, heads, strict=True):
        entry.fd, entry.head = descriptor, ctypes.cast(head, ctypes.POINTER(ctypes.c_uint8))
    params = bindings.llama_flash_params(io_engine=IO_ENGINES[io_engine])
    n_good, error = ctypes.c_uint32(), bindings.llama_flash_error()
    code = library().llama_flash_prompt_restore(
        *(context, seq, window, first, _pointer(tokens), block, array, len(files)),
        *(ctypes.byref(params), ctypes.byref(n_good), ctypes.byref(error)),
    )
    if code != 0:
        raise_error(error)
    return n_good.value


def copy(context: Any, source: int, target: int, first: int, last: int, tokens: Tokens) -> None:
    """Copies positions from `first` to before `last` to a sequence that has the same tokens before them.

    tokens: of positions 0 on.

    Raises:
        NotThere: not all of it is in memory, or it cannot be divided; nothing has changed.
        FlashError: there is no room.
    """
    error = bindings.llama_flash_error()
    code = library().llama_flash_prompt_copy(
        context, source, target, first, last, _pointer(tokens), ctypes.byref(error)
    )
    if code == bindings.llama_flash_code.LLAMA_FLASH_E_INVALID:
        raise NotThere(error.message.decode(errors="replace"))
    if code != 0:
        raise_error(error)


def checksum(data: Any) -> int:
    """CRC32C by pieces, of a writable buffer."""
    view = memoryview(data)
    where = (ctypes.c_uint8 * len(view)).from_buffer(view)
    value: int = library().llama_flash_checksum(where, len(view))
    return value


def clear(context: Any, seq: int) -> None:
    """Removes all that the sequence has."""
    import llama_cpp

    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), seq, -1, -1)


def state_of(context: Any, seq: int, n_tokens: int) -> bytes:
    """What the sequence has that is not in cells, behind n_tokens tokens; empty where it is not there."""
    import llama_cpp

    if llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(context), seq) != n_tokens - 1:
        return b""
    size = llama_cpp.llama_state_seq_get_size_ext(context, seq, _PARTIAL)
    data = (ctypes.c_uint8 * size)()
    n = llama_cpp.llama_state_seq_get_data_ext(context, data, size, seq, _PARTIAL)
    return bytes(data) if n == size else b""


def set_state(context: Any, seq: int, state: memoryview) -> bool:
    """Whether the engine has taken it."""
    import llama_cpp

    data = (ctypes.c_uint8 * len(state)).from_buffer(state)
    return bool(llama_cpp.llama_state_seq_set_data_ext(context, data, len(state), seq, _PARTIAL) == len(state))


def _pointer(tokens: Tokens) -> Any:
    assert tokens.flags.c_contiguous and tokens.dtype == np.int32
    return tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
