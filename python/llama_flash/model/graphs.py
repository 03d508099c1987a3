"""What a model's graphs use and need: asked of the engine's own graphs, without the weights.

The engine lays the model out without memory (`no_alloc`), from a file in memory that has the model's head and no data.
The vocabulary is left out of it, which is most of what reading a head takes; no graph depends on more than its size.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import FlashError
from ..native import bindings
from ..native.calls import context_memory, graph_uses
from .bundles import read_bundles
from .ggml_types import tensor_bytes
from .gguf import GgufMeta
from .head import SkippedArray, Value
from .no_alloc import context_params, no_alloc_context
from .shape import ContextShape

__all__ = ["Graphs", "Use", "graphs_of"]

_ALIGNMENT = 32
_TOKENS = 64  # of a ubatch that is a prompt
_MOST_KEPT = 16
_TYPE_NUMBERS = {  # of GGUF
    name: number
    for number, name in enumerate(
        (
            "uint8",
            "int8",
            "uint16",
            "int16",
            "uint32",
            "int32",
            "float32",
            "bool",
            "string",
            "",
            "uint64",
            "int64",
            "float64",
        )
    )
}
_ARRAY = 9
_LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

_Graph = bindings.llama_flash_graph

_kept: dict[tuple[Any, ...], Graphs | FlashError] = {}


class Use(enum.IntFlag):
    """What graphs do with a weight (enum llama_flash_use)."""

    MUL_MAT = 1
    MUL_MAT_ID = 2
    GET_ROWS = 4
    OTHER = 8
    ROUTES = 16


_ON_DEVICE, _HERE = 32, 64  # LLAMA_FLASH_USE_DEVICE and _HOST, which are no uses


@dataclass(frozen=True)
class Graphs:
    """Of a model and a context."""

    uses: Mapping[str, Use]  # by name, the weights that all graphs use, together
    kv: int  # bytes of the KV cache and of recurrent state
    compute: int  # bytes of graph buffers; the work buffer is not among them
    on_device: frozenset[str] = frozenset()  # weights in the memory of a device; what is told of others is not
    twice: frozenset[str] = frozenset()  # of these, what main memory has as well: an embedding, and the output
    routers: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # by experts: router and norm ("": none known)


def graphs_of(meta: GgufMeta, shape: ContextShape) -> Graphs:
    """Of a context of `shape`. What was found for a file is remembered. Takes some 20 to 100 ms.

    Raises:
        FlashError: the engine cannot load the model or make such a context.
    """
    stats = tuple(file.stat() for file in meta.files)
    key = (meta.files, shape, len(meta.tensors), *((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))
    if key not in _kept:
        while len(_kept) >= _MOST_KEPT:
            del _kept[next(iter(_kept))]
        try:
            _kept[key] = _ask(meta, shape)
        except FlashError as error:
            _kept[key] = error
    found = _kept[key]
    if isinstance(found, FlashError):
        raise found
    return found


def _ask(meta: GgufMeta, shape: ContextShape) -> Graphs:
    try:
        with _head_alone(meta) as path:
            return _ask_engine(path, meta, shape)
    except (FlashError, KeyError, ValueError, struct.error):
        return _ask_engine(str(meta.files[0]), meta, shape)  # where more of the head matters after all


def _ask_engine(path: str, meta: GgufMeta, shape: ContextShape) -> Graphs:
    import llama_cpp
    from llama_cpp._utils import suppress_stdout_stderr

    uses: dict[str, Use] = {}
    on_device: set[str] = set()
    here: set[str] = set()
    routers: dict[str, tuple[str, str]] = {}
    with no_alloc_context(path, read_bundles(meta), context_params(shape), devices=shape.devices) as (model, context):
        buffers = context_memory(context)
        many = min(_TOKENS, shape.n_ubatch)
        graphs = [(1, _Graph.LLAMA_FLASH_GRAPH_TOKENS), (many, _Graph.LLAMA_FLASH_GRAPH_TOKENS)]
        if llama_cpp.llama_model_has_encoder(model):
            graphs.append((many, _Graph.LLAMA_FLASH_GRAPH_ENCODER))
        graphs.append((many, _Graph.LLAMA_FLASH_GRAPH_EMBEDDINGS))
        for n_tokens, graph in graphs:
            with suppress_stdout_stderr(disable=False):  # the engine tells of each input
                found = list(graph_uses(context, n_tokens, graph))
            for weight in found:
                if weight.name not in meta.tensors:
                    continue
                uses[weight.name] = uses.get(weight.name, Use(0)) | Use(weight.uses & ~(_ON_DEVICE | _HERE))
                if weight.uses & _ON_DEVICE:
                    on_device.add(weight.name)
                if weight.uses & _HERE:
                    here.add(weight.name)
                if weight.router in meta.tensors:
                    routers[weight.name] = (weight.router, weight.norm if weight.norm in meta.tensors else "")
    there = frozenset(on_device)
    return Graphs(uses, buffers.context, buffers.compute, there, there & here, routers)


@contextmanager
def _head_alone(meta: GgufMeta) -> Iterator[str]:
    """Path of a GGUF file with the tensors and values of `meta`, no vocabulary and no data, which takes no memory."""
    descriptor = os.memfd_create("head", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            end = _write_head(stream, meta)
        os.ftruncate(descriptor, end)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _write_head(stream: Any, meta: GgufMeta) -> int:
    """Returns where the data would end."""
    values = {
        key: (meta.types[key], value)
        for key, value in meta.values.items()
        if not isinstance(value, SkippedArray) and _matters(key)
    }
    values["tokenizer.ggml.model"] = ("string", "none")
    values[f"{meta.architecture}.vocab_size"] = ("uint32", meta.n_vocab)
    stream.write(struct.pack("<4sIQQ", b"GGUF", 3, len(meta.tensors), len(values)))
    for key, (kind, value) in values.items():
        stream.write(_string(key) + _value(kind, value))
    offset = 0
    for tensor in meta.tensors.values():
        shape = tensor.shape
        stream.write(_string(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type, offset))
        offset += -(-tensor_bytes(tensor.type, shape) // _ALIGNMENT) * _ALIGNMENT
    start: int = stream.tell()
    return -(-start // _ALIGNMENT) * _ALIGNMENT + offset


def _matters(key: str) -> bool:
    if key.startswith("tokenizer.ggml.") and key != "tokenizer.ggml.token_type_count":
        return False
    return not key.startswith(("split.", "tokenizer.chat_template")) and key != "general.alignment"


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="replace")
    return struct.pack("<Q", len(data)) + data


def _value(kind: str, value: Value) -> bytes:
    if isinstance(value, list):
        number = _TYPE_NUMBERS[kind.removesuffix("[]")]
        head = struct.pack("<IIQ", _ARRAY, number, len(value))
        return head + b"".join(_scalar(number, item) for item in value)
    number = _TYPE_NUMBERS[kind]
    return struct.pack("<I", number) + _scalar(number, value)


def _scalar(number: int, value: Any) -> bytes:
    return _string(value) if isinstance(value, str) else struct.pack(f"<{_LAYOUTS[number]}", value)
