"""The few functions of ggml that llama_cpp does not wrap, called through ctypes.

Symbols are looked up through the handle of libllama, which finds those of the ggml libraries it is linked to.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

# types stored element by element: ggml's block is one element; a chunk of them stands in for a block here
_UNBLOCKED = 32


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
    lib.ggml_get_name.restype = ctypes.c_char_p
    lib.ggml_get_name.argtypes = [ctypes.c_void_p]
    lib.ggml_get_data.restype = ctypes.c_void_p
    lib.ggml_get_data.argtypes = [ctypes.c_void_p]
    return lib


def block_layout(kind: GGMLQuantizationType) -> tuple[int, int]:
    """Elements and bytes of the smallest unit that `quantize` deals in."""
    elements, size = GGML_QUANT_SIZES[kind]
    return (elements, size) if elements > 1 else (_UNBLOCKED, _UNBLOCKED * size)


def quantize(values: npt.NDArray[np.float32], kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Quantises rows of float32 with ggml's own code. values: [rows, columns]; returns [rows, bytes per row]."""
    rows, columns = values.shape
    elements, size = block_layout(kind)
    if columns % elements:
        raise ValueError(f"{kind.name} needs rows that are a multiple of {elements}, got {columns}")
    source = np.ascontiguousarray(values, dtype=np.float32)
    out = np.empty((rows, columns // elements * size), np.uint8)
    written = library().ggml_quantize_chunk(int(kind), source.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    if written != out.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {kind.name}, expected {out.nbytes}")
    return out


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
