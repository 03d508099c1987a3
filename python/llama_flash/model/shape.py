"""The context that a model is to run in: what decides the size of its buffers."""

from __future__ import annotations

from dataclasses import dataclass

from .devices import Devices
from .gguf import GgufMeta

__all__ = ["KV_TYPES", "ContextShape", "context_shape", "whole_cells"]

_CELLS = 256  # the engine makes the context of a sequence a multiple of it

# types of KV caches: enum ggml_type
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}


@dataclass(frozen=True)
class ContextShape:
    """What decides the size of a context's buffers."""

    n_ctx: int  # tokens, of all sequences together; 0: as trained
    n_batch: int = 512
    n_ubatch: int = 512
    n_outputs: int = 1  # rows of logits kept by the engine
    n_scores: int = 0  # rows of logits kept in Python
    type_k: int = 1  # enum ggml_type
    type_v: int = 1
    flash_attn: bool = False
    embedding: bool = False
    prompts: int = 0  # bytes that reading and writing the state of prompts takes
    aside: int = 0  # bytes that the caller keeps beside it, sooner or later: prompts that have left the KV cache
    n_sequences: int = 1  # at most; each has cells of its own, n_ctx / n_sequences of them
    devices: Devices | None = None  # that have memory of their own, and layers of the model


def whole_cells(n_ctx: int) -> int:
    """Tokens of a sequence that asked for so many, as the engine rounds them where there are several."""
    return -(-n_ctx // _CELLS) * _CELLS


def context_shape(
    meta: GgufMeta,
    n_ctx: int,
    n_batch: int,
    n_ubatch: int,
    type_k: int | None,
    type_v: int | None,
    logits_all: bool,
    flash_attn: bool,
    parallel: int,
    n_drafted: int,
) -> ContextShape:
    """The context that `Llama` makes of its arguments, or a server of many sequences. n_drafted: of each, at most."""
    for name, value, least in (
        ("n_ctx", n_ctx, 0),
        ("n_batch", n_batch, 1),
        ("n_ubatch", n_ubatch, 1),
        ("parallel", parallel, 1),
    ):
        of = "" if name == "parallel" else " of tokens"
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected a whole number{of}, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: {value} is not a whole number{of} from {least} on")
    for name, kind in (("type_k", type_k), ("type_v", type_v)):
        if kind is not None and kind not in KV_TYPES.values():
            known = ", ".join(f"{number} ({text})" for text, number in KV_TYPES.items())
            raise ValueError(f"{name}: {kind!r} is no type of KV caches; expected one of {known}")
    n_ctx = n_ctx or meta.number("context_length", 4096)
    if parallel > 1:
        n_ctx = parallel * whole_cells(n_ctx)
    n_batch = min(n_ctx, n_batch)
    return ContextShape(
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=min(n_batch, n_ubatch),
        n_outputs=n_batch if logits_all else min(n_batch, parallel * (1 + n_drafted)),
        n_scores=n_ctx if logits_all else 0,
        type_k=KV_TYPES["f16"] if type_k is None else type_k,
        type_v=KV_TYPES["f16"] if type_v is None else type_v,
        flash_attn=flash_attn,
        n_sequences=parallel,
    )
