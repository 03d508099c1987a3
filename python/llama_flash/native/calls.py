"""What is asked of the plugin without a session: the engine's buffers and graphs, loads, probes of a device."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import FlashError
from . import bindings
from .library import IO_ENGINES, library, raise_error

__all__ = [
    "WeightUse",
    "abort_callback",
    "context_memory",
    "cpu_buffer_type",
    "discard_compute",
    "flash_buffer_type",
    "graph_uses",
    "guarded",
    "has_devices",
    "load_staging",
    "name_devices",
    "named_devices",
    "override",
    "probe_reads",
]

_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU
_MOST_TEXT = 16 << 10  # bytes of the engine's log
_STOCK = {"llama_flash_load_model": "llama_model_load_from_file", "llama_flash_new_context": "llama_init_from_model"}


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def override(model_params: Any, *groups: tuple[Sequence[str], int]) -> object:
    """Gives the weights whose names match one of a group's patterns its buffer type.

    What it returns must outlive the load. model_params: llama_model_params.
    """
    entries = [_Override(pattern.encode(), buffer_type) for patterns, buffer_type in groups for pattern in patterns]
    array = (_Override * (len(entries) + 1))(*entries)
    model_params.tensor_buft_overrides = ctypes.addressof(array)
    return array


def flash_buffer_type() -> int:
    """ggml_backend_buffer_type_t of weights on flash."""
    address: int = library().llama_flash_buffer_type()
    return address


def cpu_buffer_type() -> int:
    """ggml_backend_buffer_type_t of plain memory, from the engine's library that the plugin is linked with."""
    function = library().ggml_backend_cpu_buffer_type
    function.restype = ctypes.c_void_p
    address: int = function()
    return address


def abort_callback() -> Any:
    """The function that stops a decode after a failed read, for llama_context_params.abort_callback."""
    import llama_cpp

    return ctypes.cast(library().llama_flash_abort, llama_cpp.ggml_abort_callback)


def context_memory(context: Any) -> bindings.llama_flash_context_memory:
    """Bytes of weights, KV cache and graph buffers of a context.

    Raises:
        FlashError: the engine does not tell them.
    """
    buffers = bindings.llama_flash_context_memory()
    if library().llama_flash_get_context_memory(context, ctypes.byref(buffers)) != 0:
        raise FlashError("the engine does not tell the sizes of its buffers")
    return buffers


def discard_compute(context: Any) -> None:
    """Gives back the memory that the context's graph buffers have touched, between two calls of the engine."""
    library().llama_flash_discard_compute(context)


@dataclass(frozen=True)
class WeightUse:
    """Of a weight, in one graph; see struct llama_flash_weight_use."""

    name: str
    uses: int  # enum llama_flash_use
    router: str  # of experts; "": none is known
    norm: str


def has_devices() -> bool:
    """Whether the engine knows a device with memory of its own."""
    lib = library()
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    devices = (lib.ggml_backend_dev_get(ctypes.c_size_t(i)) for i in range(lib.ggml_backend_dev_count()))
    return any(lib.ggml_backend_dev_type(ctypes.c_void_p(device)) == _GPU for device in devices)


def name_devices(model_params: Any, devices: Sequence[int] | None, shares: Sequence[float]) -> object:
    """Enters ggml_backend_dev_t (None: all that the engine finds) and their shares of layers into llama_model_params.

    What it returns must outlive the load.
    """
    kept: list[object] = []
    if shares:
        floats = (ctypes.c_float * len(shares))(*shares)
        model_params.tensor_split = ctypes.cast(floats, ctypes.POINTER(ctypes.c_float))
        kept.append(floats)
    if devices is not None:
        named = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
        model_params.devices = ctypes.addressof(named)
        kept.append(named)
    return kept


def named_devices(model_params: Any) -> tuple[int, ...] | None:
    """The ggml_backend_dev_t of llama_model_params; None: all that the engine finds."""
    if not model_params.devices:
        return None
    array = ctypes.cast(model_params.devices, ctypes.POINTER(ctypes.c_void_p))
    found: list[int] = []
    while (device := array[len(found)]) is not None:
        found.append(device)
    return tuple(found)


def load_staging() -> int:
    """Bytes of main memory through which the engine's loader may send weights to a device of this process."""
    return int(library().llama_flash_load_staging())


def graph_uses(context: Any, n_tokens: int, graph: int) -> Iterator[WeightUse]:
    """The weights that a graph uses. graph: enum llama_flash_graph."""
    error, n = bindings.llama_flash_error(), ctypes.c_uint64()
    found = (bindings.llama_flash_weight_use * 0)()
    while True:
        code = library().llama_flash_graph_uses(
            context, n_tokens, graph, found, len(found), ctypes.byref(n), ctypes.byref(error)
        )
        if code != 0:
            raise_error(error)
        if n.value <= len(found):
            break
        found = (bindings.llama_flash_weight_use * n.value)()
    names = ["", *(entry.name.decode("utf-8", errors="replace") for entry in found[: n.value])]
    for name, entry in zip(names[1:], found, strict=False):
        yield WeightUse(name, entry.uses, names[entry.router], names[entry.norm])


def guarded(function: str, of: Any, params: Any) -> tuple[int, str]:
    """Address of what llama_flash_load_model or llama_flash_new_context made; 0 with the engine's log if nothing."""
    try:
        call: Callable[..., int | None] = getattr(library(), function)
    except FlashError:  # without the plugin, the engine is as stock
        from llama_cpp import llama_cpp

        return getattr(llama_cpp, _STOCK[function])(of, params) or 0, ""
    reason = ctypes.create_string_buffer(_MOST_TEXT)
    made = call(of, ctypes.byref(params), reason, _MOST_TEXT)
    return made or 0, reason.value.decode("utf-8", errors="replace")


def probe_reads(
    path: str | os.PathLike[str], chunk: int, depth: int, seconds: float, io_engine: str = "auto"
) -> bindings.llama_flash_probe:
    """Random reads of `chunk` bytes, `depth` in flight, by the plugin's reader.

    Raises:
        FlashReadError: the file cannot be opened or read.
        FlashError: a chunk larger than the file or not of whole sectors of 4096 bytes, or no such I/O engine here.
    """
    import llama_cpp  # noqa: F401  # registers the plugin

    params = bindings.llama_flash_params(io_engine=IO_ENGINES[io_engine], io_depth=depth)
    probe, error = bindings.llama_flash_probe(), bindings.llama_flash_error()
    milliseconds = max(1, int(1000 * seconds))
    code = library().llama_flash_probe_reads(
        os.fsencode(path), chunk, milliseconds, ctypes.byref(params), ctypes.byref(probe), ctypes.byref(error)
    )
    if code != 0:
        raise_error(error)
    return probe
