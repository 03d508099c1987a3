"""The engine's model and context laid out and not allocated: what it would do, asked of the engine itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..budget.rooms import held_by_process
from ..native.calls import cpu_buffer_type, override
from ..native.library import note_settled, trim_heap
from .bundles import Bundles
from .devices import Devices
from .load import load_model, new_context
from .shape import ContextShape

__all__ = ["context_params", "no_alloc_context"]


@contextmanager
def no_alloc_context(
    path: str, bundles: Bundles | None, context_params: Any, *, devices: Devices | None = None, mtp: bool = False
) -> Iterator[tuple[Any, Any]]:
    """The engine's model and context of a file, laid out and not allocated: nothing can be computed.

    Args:
        devices: what of it lies on devices; None: nothing.
        mtp: with its head of multi-token prediction.

    Raises:
        FlashFormatError: the engine refuses the model.
        FlashError: the engine cannot make such a context.
    """
    import llama_cpp
    from llama_cpp._utils import suppress_stdout_stderr  # as llama_cpp itself does where it is not verbose

    trim_heap()
    before = held_by_process()
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mtp = True, mtp
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    parts = [f"^{re.escape(name)}$" for name in (bundles.part_names() if bundles else ())]
    params.n_gpu_layers = 0  # the engine's default is all of them
    kept = [devices.enter(params)] if devices else []  # until the model is there
    groups = devices.overrides() if devices else []
    if parts:
        # the loader refuses parts of bundles in buffers that would be filled; nothing is filled here
        groups.append((parts, cpu_buffer_type()))
    if groups:
        kept.append(override(params, *groups))
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
        trim_heap()
        note_settled(held_by_process() - before)


def context_params(shape: ContextShape) -> Any:
    """`struct llama_context_params` of a context of `shape`."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = shape.n_ctx, shape.n_batch, shape.n_ubatch
    params.type_k, params.type_v = shape.type_k, shape.type_v
    params.embeddings = shape.embedding
    params.n_seq_max = shape.n_sequences
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if shape.flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    if shape.devices is not None:
        params.offload_kqv, params.op_offload = shape.devices.kqv, shape.devices.op_offload
    if shape.n_outputs < shape.n_batch:
        params.n_outputs_max = shape.n_outputs
    return params
