"""What a model would take in memory, asked of the engine and of the plugin without loading it.

The engine lays out model and context without allocating them (`no_alloc`); the plugin binds the flash tensors to the
file and says what it needs. Both are the code that runs at load, so that a plan and a load cannot differ.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from . import _bindings, engine
from .budget import held_by_process
from .bundles import Bundles, read_bundles
from .errors import FlashError
from .gguf_meta import GgufMeta, check_is_model, read_gguf
from .model_load import load_model, new_context
from .offload import BufferTypeOverride, neuron_params
from .options import FlashOffload
from .placement import ContextShape, Mode, Plan
from .sizes import parse_size

__all__ = [
    "EngineSizes",
    "FlashNeeds",
    "buffers_of",
    "check_model",
    "context_params",
    "engine_sizes",
    "no_alloc_context",
]

_MALLOC_PAGE = 4096  # of a larger block only the page with its head is touched
_CHECKED_CTX = 512  # tokens of the context that a check makes
_F32 = 0  # GGML_TYPE_F32


@dataclass(frozen=True)
class EngineSizes:
    """What the engine allocates beside weights, in bytes."""

    heap: int  # vocabulary, graphs, thread pool, batch
    kv: int
    compute: int  # graph buffers; the work buffer is not among them
    doubled: int  # weights that are there twice (an embedding that is the output, too)


def check_model(path: str | os.PathLike[str]) -> GgufMeta:
    """Whether a load would refuse the file: its head, its bundles, and what the engine makes of them.

    Raises:
        FlashFormatError: it would, with the reason and what to do.
        FlashError: the engine cannot be asked.
        OSError: a file cannot be read.
    """
    meta = read_gguf(path)
    engine_sizes(meta, read_bundles(meta), ContextShape(n_ctx=_CHECKED_CTX))
    return meta


def engine_sizes(meta: GgufMeta, bundles: Bundles | None, shape: ContextShape) -> EngineSizes:
    """Of a model and a context of `shape`. Takes as long as reading the vocabulary; what it takes is free afterwards.

    Raises:
        FlashFormatError: the engine refuses the model.
        FlashError: the engine cannot make such a context.
    """
    check_is_model(meta)
    path = str(meta.files[0])
    engine.trim_heap()
    before = held_by_process()
    with no_alloc_context(path, bundles, context_params(shape)) as (_, context):
        buffers = buffers_of(context)
        heap = held_by_process() - before
    predictors = bundles.predictor_bytes if bundles else 0
    weights = sum(tensor.size for tensor in meta.tensors.values()) - predictors
    # llama_cpp's batch: a list of n_ctx sequences for each token
    batch = shape.n_batch * min(4 * shape.n_ctx, _MALLOC_PAGE)
    return EngineSizes(
        max(0, heap) + predictors + batch, buffers.context, buffers.compute, max(0, buffers.model - weights)
    )


@contextmanager
def no_alloc_context(path: str, bundles: Bundles | None, context_params: Any) -> Iterator[tuple[Any, Any]]:
    """The engine's model and context of a file, laid out and not allocated: nothing can be computed.

    Raises:
        FlashFormatError: the engine refuses the model.
        FlashError: the engine cannot make such a context.
    """
    import llama_cpp
    from llama_cpp._utils import suppress_stdout_stderr  # as llama_cpp itself does where it is not verbose

    engine.trim_heap()
    before = held_by_process()
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    parts = [f"^{re.escape(name)}$".encode() for name in (bundles.part_names() if bundles else ())]
    # the loader refuses parts of bundles in buffers that would be filled; nothing is filled here
    buffer_type = _cpu_buffer_type() if parts else None
    overrides = (BufferTypeOverride * (len(parts) + 1))(*(BufferTypeOverride(part, buffer_type) for part in parts))
    if parts:
        params.tensor_buft_overrides = ctypes.addressof(overrides)
    with suppress_stdout_stderr(disable=False):
        model = load_model(path, params)
    context = None
    try:
        with suppress_stdout_stderr(disable=False):
            context = new_context(path, model, context_params)
        yield model, context
    finally:
        if context:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
        engine.trim_heap()
        engine.note_settled(held_by_process() - before)


def buffers_of(context: Any) -> Any:
    """`struct llama_flash_context_memory` of a context: bytes of weights, KV cache and graph buffers."""
    buffers = _bindings.llama_flash_context_memory()
    if engine.library().llama_flash_get_context_memory(context, ctypes.byref(buffers)) != 0:
        raise FlashError("the engine does not tell the sizes of its buffers")
    return buffers


def _cpu_buffer_type() -> int:
    """ggml_backend_buffer_type_t of plain memory, from the engine's library that the plugin is linked with."""
    function = engine.library().ggml_backend_cpu_buffer_type
    function.restype = ctypes.c_void_p
    address: int = function()
    return address


def context_params(shape: ContextShape) -> Any:
    """`struct llama_context_params` of a context of `shape`."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = shape.n_ctx, shape.n_batch, shape.n_ubatch
    params.type_k, params.type_v = shape.type_k, shape.type_v
    params.embeddings = shape.embedding
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if shape.flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    if shape.n_outputs == 1:
        params.n_outputs_max = 1
    return params


class FlashNeeds:
    """What the plugin needs for the flash tensors of a plan. To be closed."""

    def __init__(self, plan: Plan, options: FlashOffload, n_ubatch: int) -> None:
        """Raises FlashError where the plugin refuses a tensor, FlashReadError where a file cannot be opened."""
        self._plan, self._options, self._n_ubatch = plan, options, n_ubatch
        self._lib = engine.library()
        params = _bindings.llama_flash_params(
            io_engine=engine.IO_ENGINES["pread"], io_threads=1, panel_bytes=parse_size(options.panel_bytes)
        )
        error = _bindings.llama_flash_error()
        self._handle = self._lib.llama_flash_session_new(ctypes.byref(params), ctypes.byref(error))
        if not self._handle:
            engine.raise_error(error)
        try:
            self._bind()
        except BaseException:
            self.close()
            raise

    def _bind(self) -> None:
        for name, only in self._plan.tables.items():
            self._call("llama_flash_session_add_rows", name.encode(), only)
        for tensor in self._plan.tensors:
            ne0, ne1, ne2 = (*tensor.shape, 1, 1)[:3]
            self._bind_weight(tensor.name, tensor.file, tensor.offset, tensor.type, ne0, ne1, ne2)
        if bundles := self._plan.bundles:
            # biases and predictors are on the engine's heap, not in the plugin's memory
            bare = (replace(layer, up_bias=None, gate_bias=None, rank=0, predictor=None) for layer in bundles.layers)
            bundles = replace(bundles, layers=tuple(bare))
            for description in bundles.descriptions():
                self._call("llama_flash_session_add_bundle", ctypes.byref(description))
            for layer in bundles.layers:
                for part in bundles.format.parts:
                    ne = (bundles.format.n_embd, layer.n_ff)
                    ne = ne[::-1] if part.name == "down" else ne
                    name = f"blk.{layer.layer}.ffn_{part.name}{'_exps' if layer.n_expert else ''}.weight"
                    n_expert = max(1, layer.n_expert)
                    # down lies across its rows: the loader presents it as F32, whatever blocks the part has
                    kind = _F32 if part.name == "down" else part.type
                    self._bind_weight(name, layer.tensor.file, layer.tensor.offset, kind, *ne, n_expert)
        self._call("llama_flash_session_bind_end")

    def _bind_weight(self, name: str, file: Any, offset: int, kind: int, *ne: int) -> None:
        self._call("llama_flash_session_bind_weight", name.encode(), os.fsencode(file), offset, kind, *ne)

    def requirements(self, predictor: Mode = "off") -> Any:
        """`struct llama_flash_requirements`; predictor: how active neurons are found, where there are bundles."""
        if self._plan.bundles:
            params = neuron_params(predictor, self._options, self._plan.bundles, self._n_ubatch)
            self._call("llama_flash_session_set_neurons", ctypes.byref(params))
        needs = _bindings.llama_flash_requirements()
        self._lib.llama_flash_session_requirements(self._handle, ctypes.byref(needs))
        return needs

    def close(self) -> None:
        if self._handle:
            self._lib.llama_flash_session_free(self._handle)
            self._handle = None

    def _call(self, function: str, *arguments: Any) -> None:
        error = _bindings.llama_flash_error()
        if getattr(self._lib, function)(self._handle, *arguments, ctypes.byref(error)) != 0:
            engine.raise_error(error)
