"""The plugin's session: the one owner of its address, and every call that it takes.

Arguments are plain numbers, names and arrays; results are the generated structures, or arrays. What the plugin refuses
is raised. When a call may be made, and from which thread, plugin/include/llama_flash.h says.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from . import bindings
from .library import IO_ENGINES, library, raise_error
from .params import Memory, NeuronBundle, Requirements

__all__ = ["TRACE_ENTRY", "Floats", "Ids", "Session"]

Ids = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]

# struct llama_flash_trace_entry
TRACE_ENTRY = np.dtype([("token", "u8"), ("tensor", "u4"), ("record", "u4"), ("n_tokens", "u4"), ("uses", "u4")])


class Session:
    """`struct llama_flash_session`. To be closed.

    Args:
        io_depth, io_threads, lookahead, tries_ahead, panel_bytes, few_tokens: as in struct llama_flash_params; 0: its
            default.

    Raises:
        FlashError: the plugin is missing, or refuses.
    """

    def __init__(
        self,
        io_engine: str = "auto",
        *,
        io_depth: int = 0,
        io_threads: int = 0,
        lookahead: int = 0,
        tries_ahead: bool = False,
        panel_bytes: int = 0,
        few_tokens: int = 0,
    ) -> None:
        self._in_use = 0
        self._later: Callable[[], None] | None = None
        self._address: int | None = None
        self._pid = os.getpid()
        self._lib = library()
        params = bindings.llama_flash_params(
            io_engine=IO_ENGINES[io_engine],
            io_depth=io_depth,
            io_threads=io_threads,
            lookahead=lookahead,
            tries_ahead=tries_ahead,
            panel_bytes=panel_bytes,
            few_tokens=few_tokens,
        )
        error = bindings.llama_flash_error()
        self._address = self._lib.llama_flash_session_new(ctypes.byref(params), ctypes.byref(error))
        if not self._address:
            raise_error(error)

    # life

    @property
    def address(self) -> int | None:
        """None after close()."""
        return self._address

    @property
    def forked(self) -> bool:
        """The process is a child of the one that has made it, and cannot use it."""
        return self._pid != os.getpid()

    def close(self) -> None:
        """Frees it. May be called twice; all other calls are refused afterwards."""
        address, self._address = self._address, None
        if address is not None:
            self._lib.llama_flash_session_free(address)

    @contextlib.contextmanager
    def using(self) -> Iterator[bool]:
        """Not closed meanwhile: garbage collection may want to, in this very thread. Yields whether it is open."""
        self._in_use += 1
        try:
            yield self._address is not None
        finally:
            self._in_use -= 1
            if self._later is not None and not self._in_use:
                later, self._later = self._later, None
                later()

    def postpone(self, close: Callable[[], None]) -> bool:
        """Whether it is in use; then `close` is called as soon as it is not."""
        if self._in_use:
            self._later = close
        return self._in_use > 0

    # what is on flash

    def add_rows(self, name: str, only: bool) -> None:
        """A table whose rows are picked by number. only: it has no other use."""
        self._call("llama_flash_session_add_rows", name.encode(), only)

    def add_router(self, experts: str, weight: Floats, norm: Floats | None) -> None:
        """The router of these experts, which lies on a device. weight: [n_expert, n_embd]; norm: [n_embd]."""
        n_expert, n_embd = weight.shape
        floats = ctypes.POINTER(ctypes.c_float)
        of_norm = None if norm is None else norm.ctypes.data_as(floats)
        name = experts.encode()
        self._call("llama_flash_session_add_router", name, weight.ctypes.data_as(floats), of_norm, n_embd, n_expert)

    def add_bundle(self, bundle: NeuronBundle) -> None:
        self._call("llama_flash_session_add_bundle", ctypes.byref(bundle.as_struct()))

    def bind_begin(self) -> None:
        self._call("llama_flash_session_bind_begin")

    def bind_weight(self, name: str, file: str | os.PathLike[str], offset: int, kind: int, *ne: int) -> None:
        """kind: enum ggml_type; ne: three numbers of elements, the row length first."""
        self._call("llama_flash_session_bind_weight", name.encode(), os.fsencode(file), offset, kind, *ne)

    def bind_end(self) -> None:
        self._call("llama_flash_session_bind_end")

    def set_neurons(self, params: bindings.llama_flash_neuron_params) -> None:
        self._call("llama_flash_session_set_neurons", ctypes.byref(params))

    def requirements(self) -> Requirements:
        """What the flash tensors need."""
        needs = Requirements()
        self._lib.llama_flash_session_requirements(self._address, ctypes.byref(needs))
        return needs

    def waiting(self) -> tuple[float, str]:
        """Seconds for which a read has been waited for, and which; 0: none is. Waits for nothing itself."""
        read = bindings.llama_flash_error()
        seconds = self._lib.llama_flash_session_waiting(self._address, ctypes.byref(read)) / 1e9
        return seconds, bytes(read.message).decode(errors="replace") if seconds else ""

    # memory

    def set_memory(self, n_bytes: int) -> None:
        self._call("llama_flash_session_set_memory", n_bytes)

    def resize(self, n_bytes: int, urgent: bool = False) -> bindings.llama_flash_resize:
        """A step on the way to that much memory."""
        state = bindings.llama_flash_resize()
        self._call("llama_flash_session_resize", n_bytes, urgent, ctypes.byref(state))
        return state

    def few_tokens(self, few: bool) -> None:
        """Whether calls compute few tokens from now on, so that room of prompts is of use for others."""
        self._call("llama_flash_session_few_tokens", few)

    def divide(self, n_bytes: int) -> Memory:
        """How set_memory would divide so many bytes."""
        given = Memory()
        self._call("llama_flash_session_divide", n_bytes, ctypes.byref(given))
        return given

    def memory(self) -> Memory:
        """How it is divided."""
        given = Memory()
        self._lib.llama_flash_session_memory(self._address, ctypes.byref(given))
        return given

    def hot(self, most: int | None = None) -> Ids:
        """Numbers of the records in slots, the hottest first; most: as many at most."""
        n = int(self._lib.llama_flash_session_hot(self._address, None, 0))
        ids = np.empty(n if most is None else min(n, most), np.uint64)
        found = int(self._lib.llama_flash_session_hot(self._address, _ids(ids), len(ids)))
        return ids[: min(len(ids), found)]

    def warm(self, ids: Ids) -> int:
        """Reads these records into free slots, as far as there is time; returns how many of them are done with."""
        done = ctypes.c_uint64()
        ids = np.ascontiguousarray(ids, np.uint64)
        self._call("llama_flash_session_warm", _ids(ids), len(ids), ctypes.byref(done))
        return done.value

    # what it has done

    def stats(self) -> bindings.llama_flash_stats:
        raw = bindings.llama_flash_stats()
        self._lib.llama_flash_session_stats(self._address, ctypes.byref(raw))
        return raw

    def raise_pending(self) -> None:
        """Raises what has failed since it was last asked, if anything has."""
        error = bindings.llama_flash_error()
        if self._lib.llama_flash_session_take_error(self._address, ctypes.byref(error)) != 0:
            raise_error(error)

    def tensors(self) -> list[bindings.llama_flash_tensor]:
        """All with records, in the order of their numbers."""
        n = int(self._lib.llama_flash_session_tensors(self._address, None, 0))
        raw = (bindings.llama_flash_tensor * n)()
        self._lib.llama_flash_session_tensors(self._address, raw, n)
        return list(raw)

    def residency(self, n_records: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
        """By record: where it is (enum llama_flash_place), and how many tokens ago it was last used."""
        place, age = np.zeros(n_records, np.uint8), np.zeros(n_records, np.uint32)
        self._call(
            "llama_flash_session_residency",
            place.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)),
            age.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32)),
            n_records,
        )
        return place, age

    def reuse(self) -> Ids:
        """By distance in tokens to the use before: uses; element 0: all others."""
        counts = np.zeros(bindings.LLAMA_FLASH_REUSE_TOKENS, np.uint64)
        self._call("llama_flash_session_reuse", _ids(counts))
        return counts

    # traces

    def trace(self, capacity: int) -> None:
        """Records what ops ask for, so many entries; 0: no more."""
        self._call("llama_flash_session_trace", capacity)

    def drain_trace(self, entries: npt.NDArray[Any]) -> tuple[int, int]:
        """Moves what was recorded into `entries`, of TRACE_ENTRY; returns how many there are, and how many are lost."""
        lost = ctypes.c_uint64()
        pointer = entries.ctypes.data_as(ctypes.POINTER(bindings.llama_flash_trace_entry))
        n = self._lib.llama_flash_session_trace_take(self._address, pointer, len(entries), ctypes.byref(lost))
        return int(n), lost.value

    def traced_tensors(self) -> list[bindings.llama_flash_trace_tensor]:
        """By the numbers that entries have; those without records never occur in traces."""
        found: list[bindings.llama_flash_trace_tensor] = []
        while True:
            raw = bindings.llama_flash_trace_tensor()
            if self._lib.llama_flash_session_trace_tensor(self._address, len(found), ctypes.byref(raw)):
                return found
            found.append(raw)

    def _call(self, function: str, *arguments: Any) -> None:
        error = bindings.llama_flash_error()
        if getattr(self._lib, function)(self._address, *arguments, ctypes.byref(error)) != 0:
            raise_error(error)


def _ids(array: Ids) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint64))
