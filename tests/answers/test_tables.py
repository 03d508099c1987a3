"""Tables of which rows are picked stay in the file: read row by row, whatever a ubatch asks of them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from architectures import write

N_EMBD = 256


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("gemma3n", tmp_path_factory.mktemp("tables") / "gemma3n.gguf", "q8_0")


@contextmanager
def opened(path: Path, flash: Any) -> Iterator[Any]:
    llm = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False, flash_offload=flash)
    try:
        yield llm
    finally:
        llm.close()


def logits_of(llm: Any, n_tokens: int) -> npt.NDArray[np.float32]:
    data = llama_cpp.llama_get_logits(llm.ctx)
    return np.ctypeslib.as_array(data, (n_tokens, llm.n_vocab())).copy()


def of_embeddings(llm: Any, n_tokens: int) -> npt.NDArray[np.float32]:
    """Logits of a ubatch that is given embeddings in place of tokens, as of an image."""
    batch = llama_cpp.llama_batch_init(n_tokens, N_EMBD, 1)
    try:
        values = np.random.default_rng(3).standard_normal((n_tokens, N_EMBD), np.float32)
        ctypes.memmove(batch.embd, values.ctypes.data, values.nbytes)
        batch.n_tokens = n_tokens
        for i in range(n_tokens):
            batch.pos[i], batch.n_seq_id[i], batch.logits[i] = i, 1, 1
            batch.seq_id[i][0] = 0
        assert llama_cpp.llama_decode(llm.ctx, batch) == 0
        return logits_of(llm, n_tokens)
    finally:
        llama_cpp.llama_batch_free(batch)


def test_tables_of_which_rows_are_picked_stay_in_the_file(gemma: Path) -> None:
    with opened(gemma, {"what": "all"}) as llm:
        assert llm.flash.plan.tables == {"per_layer_token_embd.weight": True, "token_embd.weight": True}
        llm.eval(list(range(10, 30)))
        assert llm.flash.stats().prompt.rows_read == 2 * 20
        llm.eval([10])
        assert llm.flash.stats().decode.rows_read == 2


def test_a_row_that_is_asked_for_many_times_at_once_is_read_once(gemma: Path) -> None:
    with opened(gemma, {"what": "all"}) as llm:
        llm.eval([7] * 30)
        assert llm.flash.stats().prompt.rows_read == 2


@pytest.mark.parametrize("n_tokens", [1, 20])
def test_embeddings_in_place_of_tokens_have_the_resident_logits(gemma: Path, n_tokens: int) -> None:
    with opened(gemma, False) as llm:
        expected = of_embeddings(llm, n_tokens)
    with opened(gemma, {"what": "all"}) as llm:
        found = of_embeddings(llm, n_tokens)
        assert llm.flash.stats().total.rows_read == 1  # that of padding, of each token's layers
    assert np.isfinite(expected).all() and expected.std() > 0
    assert (found == expected).all()
