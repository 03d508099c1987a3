"""The few functions of ggml that llama_cpp does not wrap, called through ctypes.

Symbols are looked up through the handle of libllama, which finds those of the ggml libraries it is linked to.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from gguf_tools.types import NEED_IMATRIX, WEIGHT_TYPES, block_of

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_TYPES = 43  # GGML_TYPE_COUNT
_NUMPY = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}
_SHARE = 1 << 18  # elements that are worth a thread

# types stored element by element: ggml's block is one element; a chunk of them stands in for a block here
_UNBLOCKED = 32


class _TypeTraits(ctypes.Structure):
    """ggml's `struct ggml_type_traits` (ggml.h)."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", ctypes.c_void_p),
    ]


@cache
def library() -> ctypes.CDLL:
    """The loaded engine (libllama, and with it ggml)."""
    from llama_cpp import llama_cpp

    lib: ctypes.CDLL = llama_cpp._lib
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_get_name.restype = ctypes.c_char_p
    lib.ggml_get_name.argtypes = [ctypes.c_void_p]
    lib.ggml_get_data.restype = ctypes.c_void_p
    lib.ggml_get_data.argtypes = [ctypes.c_void_p]
    return lib


def block_layout(kind: GGMLQuantizationType) -> tuple[int, int]:
    """Elements and bytes of the smallest unit that `quantize` deals in."""
    elements, size = block_of(kind)
    return (elements, size) if elements > 1 else (_UNBLOCKED, _UNBLOCKED * size)


def quantize(values: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Quantises rows of float32 with ggml's own code, on all CPUs.

    values: [rows, columns]; returns [rows, bytes per row]. Rows do not depend on each other. Raises ValueError if the
    columns are not a multiple of the type's block, or for a type that ggml cannot quantise to as things are.
    """
    n_rows, columns = values.shape
    elements, size = block_of(kind)
    if columns % elements:
        raise ValueError(f"{kind.name} needs rows that are a multiple of {elements}, got {columns}")
    if kind in NEED_IMATRIX or kind not in WEIGHT_TYPES:
        raise ValueError(f"rows cannot be quantised to {kind.name}")
    source = np.ascontiguousarray(values, dtype=np.float32)
    out = np.empty((n_rows, columns // elements * size), np.uint8)
    convert = library().ggml_quantize_chunk

    def part(rows: slice) -> None:
        written = convert(int(kind), source[rows].ctypes.data, out[rows].ctypes.data, 0, len(out[rows]), columns, None)
        if written != out[rows].nbytes:
            raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {kind.name}, expected {out[rows].nbytes}")

    _on_all_cpus(part, n_rows, columns)
    return out


def dequantize(rows: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """The float32 values of rows of any type, with ggml's own code, on all CPUs.

    rows: [rows, bytes per row]; returns [rows, columns]. Raises ValueError for a type that has no values (FLASH).
    """
    elements, size = block_of(kind)
    n_rows, n_bytes = rows.shape
    source = np.ascontiguousarray(rows)
    if kind in _NUMPY:
        return np.asarray(source.view(_NUMPY[kind]), np.float32)
    convert = library().ggml_get_type_traits(int(kind)).contents.to_float if kind < _TYPES else None
    if not convert:
        raise ValueError(f"{kind.name} has no values")
    columns = n_bytes // size * elements
    out = np.empty((n_rows, columns), np.float32)

    def part(rows: slice) -> None:
        convert(source[rows].ctypes.data, out[rows].ctypes.data, out[rows].size)

    _on_all_cpus(part, n_rows, columns)
    return out


def _on_all_cpus(part: Callable[[slice], None], n_rows: int, columns: int) -> None:
    """Calls `part` with runs of rows; ctypes lets go of the interpreter's lock meanwhile."""
    n_parts = min(len(os.sched_getaffinity(0)), n_rows, n_rows * columns // _SHARE)
    if n_parts <= 1:
        if n_rows and columns:
            part(slice(0, n_rows))
        return
    step = -(-n_rows // n_parts)
    with ThreadPoolExecutor(n_parts) as pool:
        list(pool.map(part, [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]))


class TensorView(ctypes.Structure):
    """The head of ggml's `struct ggml_tensor` (ggml.h)."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    ]


def tensor_name(tensor: int) -> str:
    name: Any = library().ggml_get_name(tensor)
    return bytes(name).decode()


def tensor_int32(tensor: int) -> npt.NDArray[np.int32]:
    """Copies a 2-D int32 tensor or view out of the engine: [ne1, ne0]."""
    view = ctypes.cast(tensor, ctypes.POINTER(TensorView)).contents
    columns, rows, stride = int(view.ne[0]), int(view.ne[1]), int(view.nb[1])
    data = int(library().ggml_get_data(tensor))
    out = np.empty((rows, columns), np.int32)
    for row in range(rows):
        ctypes.memmove(out[row].ctypes.data, data + row * stride, columns * 4)
    return out
