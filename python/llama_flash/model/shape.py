"""The context that a model is to run in: what decides the size of its buffers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KV_TYPES", "ContextShape", "whole_cells"]

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


def whole_cells(n_ctx: int) -> int:
    """Tokens of a sequence that asked for so many, as the engine rounds them where there are several."""
    return -(-n_ctx // _CELLS) * _CELLS
