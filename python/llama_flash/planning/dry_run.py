"""What a model would take in memory, asked of the engine and of the plugin without loading it.

The engine lays out model and context without allocating them (`no_alloc`); the plugin binds the flash tensors to the
file and says what it needs. Both are the code that runs at load, so that a plan and a load cannot differ.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, replace

from ..budget.rooms import held_by_process
from ..model.bundles import Bundles, read_bundles
from ..model.gguf import GgufMeta, check_is_model, read_gguf
from ..model.no_alloc import context_params, no_alloc_context
from ..model.shape import ContextShape
from ..native.calls import context_memory
from ..native.handle import Session
from ..native.library import trim_heap
from ..native.params import Memory, Mode, Requirements, neuron_params
from ..options import FlashOffload
from ..sizes import parse_size
from .placed import Plan

__all__ = ["EngineSizes", "FlashNeeds", "check_model", "engine_sizes"]

_MALLOC_PAGE = mmap.PAGESIZE  # of a larger block only the page with its head is touched
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
    trim_heap()
    before = held_by_process()
    with no_alloc_context(path, bundles, context_params(shape), devices=shape.devices) as (_, context):
        buffers = context_memory(context)
        heap = held_by_process() - before
    predictors = bundles.predictor_bytes if bundles else 0
    weights = sum(tensor.size for tensor in meta.tensors.values()) - predictors
    # llama_cpp's batch: a list of n_ctx sequences for each token
    batch = shape.n_batch * min(4 * shape.n_ctx, _MALLOC_PAGE)
    return EngineSizes(
        max(0, heap) + predictors + batch, buffers.context, buffers.compute, max(0, buffers.model - weights)
    )


class FlashNeeds:
    """What the plugin needs for the flash tensors of a plan. To be closed."""

    def __init__(self, plan: Plan, options: FlashOffload, n_ubatch: int) -> None:
        """Raises FlashError where the plugin refuses a tensor, FlashReadError where a file cannot be opened."""
        self._plan, self._options, self._n_ubatch = plan, options, n_ubatch
        self._session = Session("pread", io_threads=1, panel_bytes=parse_size(options.panel_bytes))
        try:
            self._bind()
        except BaseException:
            self.close()
            raise

    def _bind(self) -> None:
        session = self._session
        for name, only in self._plan.tables.items():
            session.add_rows(name, only)
        for tensor in self._plan.tensors:
            ne0, ne1, ne2 = (*tensor.shape, 1, 1)[:3]
            session.bind_weight(tensor.name, tensor.file, tensor.offset, tensor.type, ne0, ne1, ne2)
        if bundles := self._plan.bundles:
            # biases and predictors are on the engine's heap, not in the plugin's memory
            bare = (replace(layer, up_bias=None, gate_bias=None, rank=0, predictor=None) for layer in bundles.layers)
            bundles = replace(bundles, layers=tuple(bare))
            for description in bundles.descriptions():
                session.add_bundle(description)
            for layer in bundles.layers:
                for part in bundles.format.parts:
                    ne = (bundles.format.n_embd, layer.n_ff)
                    ne = ne[::-1] if part.name == "down" else ne
                    name = f"blk.{layer.layer}.ffn_{part.name}{'_exps' if layer.n_expert else ''}.weight"
                    n_expert = max(1, layer.n_expert)
                    # down lies across its rows: the loader presents it as F32, whatever blocks the part has
                    kind = _F32 if part.name == "down" else part.type
                    session.bind_weight(name, layer.tensor.file, layer.tensor.offset, kind, *ne, n_expert)
        session.bind_end()

    def requirements(self, predictor: Mode = "off") -> Requirements:
        """predictor: how active neurons are found, where there are bundles."""
        if bundles := self._plan.bundles:
            record_bytes = bundles.format.record_bytes
            self._session.set_neurons(neuron_params(predictor, self._options, record_bytes, self._n_ubatch))
        return self._session.requirements()

    def divide(self, n_bytes: int) -> Memory:
        """How a load would divide so many bytes, with what was asked for last."""
        return self._session.divide(n_bytes)

    def close(self) -> None:
        self._session.close()
