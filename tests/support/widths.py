"""Passes of any width over one sequence or several: what the tests of widths compare.

A *row* is a token of a sequence, named by (sequence, position); its logits are those of the token after it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import Llama, llama_cpp

Logits = npt.NDArray[np.float32]
Row = tuple[int, int, int]  # sequence, position, token


def in_passes(llm: Llama, text: Sequence[int], width: int) -> Logits:
    """Logits of a text that is computed `width` tokens at a time: [tokens, vocabulary]."""
    llm.reset()
    for begin in range(0, len(text), width):
        llm.eval(list(text[begin : begin + width]))
    return np.array(llm.scores[: len(text)], copy=True)


def different_rows(actual: Logits, expected: Logits) -> int:
    assert actual.shape == expected.shape and np.isfinite(expected).all()
    return int((actual.view(np.uint32) != expected.view(np.uint32)).any(axis=1).sum())


class Sequences:
    """A context for several sequences, each with cells of its own."""

    def __init__(self, llm: Llama, ctx: Any, n_batch: int) -> None:
        self._ctx, self._n_vocab, self._n_batch = ctx, llm.n_vocab(), n_batch

    def compute(self, rows: Sequence[Row]) -> dict[tuple[int, int], Logits]:
        """Logits of rows that are computed in one pass."""
        batch = llama_cpp.llama_batch_init(self._n_batch, 0, 1)
        try:
            batch.n_tokens = len(rows)
            for i, (sequence, position, token) in enumerate(rows):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = 1
            assert llama_cpp.llama_decode(self._ctx, batch) == 0
            found = {}
            for i, (sequence, position, _) in enumerate(rows):
                values = llama_cpp.llama_get_logits_ith(self._ctx, i)
                found[sequence, position] = np.array(np.ctypeslib.as_array(values, (self._n_vocab,)), copy=True)
            return found
        finally:
            llama_cpp.llama_batch_free(batch)

    def forget(self, sequence: int, begin: int) -> None:
        """Removes what a sequence has from a position on: a draft that was refused."""
        memory = llama_cpp.llama_get_memory(self._ctx)
        assert llama_cpp.llama_memory_seq_rm(memory, sequence, begin, -1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._ctx), True)


@contextmanager
def sequences(llm: Llama, n_sequences: int, *, n_ctx: int = 128, n_batch: int = 64) -> Iterator[Sequences]:
    """A second context of a model. n_ctx: cells of each sequence."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx * n_sequences, n_batch, n_batch
    params.n_seq_max, params.kv_unified = n_sequences, False
    params.n_threads = params.n_threads_batch = 2
    params.flash_attn_type = llm.context_params.flash_attn_type
    ctx = llama_cpp.llama_init_from_model(llm._model.model, params)
    assert ctx
    try:
        yield Sequences(llm, ctx, n_batch)
    finally:
        llama_cpp.llama_free(ctypes.c_void_p(ctx) if isinstance(ctx, int) else ctx)
