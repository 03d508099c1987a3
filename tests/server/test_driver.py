"""What llama-server's hooks reach: sessions of models that are not of a `Llama`, with several sequences."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from llama_flash import FlashBudgetError
from llama_flash.model.gguf import read_gguf
from llama_flash.model.graphs import graphs_of
from llama_flash.model.shape import ContextShape
from llama_flash.native.server import FAILED
from llama_flash.planning.placement import estimate
from llama_flash.server.driver import EngineDriver
from llama_flash.session.session import FlashSession

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
DENSE = SHIPPED.with_name("stdlib-arcee-q8_0.gguf")
N = 4  # sequences


def context_params() -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.n_outputs_max = 1024, 256, 256, N, N
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def test_a_session_lives_from_load_to_free_and_counts_one_token_of_each_sequence_as_generated() -> None:
    sessions: list[FlashSession] = []
    driver = EngineDriver({"what": "experts"}, sessions.append)
    context_of = context_params()
    model = driver.load(str(SHIPPED), llama_cpp.llama_model_default_params(), context_of)
    assert model, driver.failure
    context = driver.init(model, context_of)
    assert context, driver.failure
    (session,) = sessions
    assert session.native is not None and session.plan.mode == "flash"
    for n_tokens, n_sequences in ((30, 1), (N, N), (7, 3)):
        driver.begin(context, n_tokens, n_sequences)
        assert driver.end(context, n_tokens, n_sequences, 0) == (0, "")
    stats = session.stats()
    assert (stats.decode.tokens, stats.decode.calls) == (N, 1)
    assert (stats.prompt.tokens, stats.prompt.calls) == (37, 2)
    assert [call.is_generation for call in session.history.calls()] == [False, True, False]
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    driver.freed(model)
    assert session.native is None
    driver.freed(model)


def test_a_call_that_was_stopped_is_not_taken_for_a_full_cache() -> None:
    driver = EngineDriver({"what": "experts"}, lambda session: None)
    context_of = context_params()
    model = driver.load(str(SHIPPED), llama_cpp.llama_model_default_params(), context_of)
    context = driver.init(model, context_of)
    driver.begin(context, 1, 1)
    assert driver.end(context, 1, 1, 1) == (1, "")
    code, reason = driver.end(context, 1, 1, 2)
    assert code == FAILED and reason
    assert driver.end(context + 1, 1, 1, 2) == (2, ""), "somebody else's context"
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    driver.freed(model)


def test_what_ends_a_load_is_kept_and_nothing_is_raised(tmp_path: Path) -> None:
    driver = EngineDriver({"dram_budget": "1MiB"}, lambda session: None)
    assert driver.load(str(SHIPPED), llama_cpp.llama_model_default_params(), context_params()) == 0
    assert isinstance(driver.failure, FlashBudgetError)
    assert driver.load(str(tmp_path / "none.gguf"), llama_cpp.llama_model_default_params(), context_params()) == 0
    assert isinstance(driver.failure, OSError)


MANY = 24  # more than a pass of drafts has tokens
ROUNDS = 8


def answers_of_many(context: Any, driver: EngineDriver | None = None) -> list[np.ndarray]:
    """Logits of passes that have a token of each of MANY sequences: [MANY, vocabulary] each."""
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context)))
    texts = np.random.default_rng(3).integers(n_vocab, size=(ROUNDS, MANY))
    batch = llama_cpp.llama_batch_init(MANY, 0, 1)
    found = []
    for position, row in enumerate(texts):
        batch.n_tokens = MANY
        for i, token in enumerate(row):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i
        if driver is not None:
            driver.begin(context, MANY, MANY)
        assert llama_cpp.llama_decode(context, batch) == 0
        if driver is not None:
            assert driver.end(context, MANY, MANY, 0) == (0, "")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (MANY, n_vocab))
        found.append(np.array(logits, copy=True))
    llama_cpp.llama_batch_free(batch)
    return found


@pytest.mark.parametrize(("path", "what"), [(SHIPPED, "experts"), (DENSE, "all")])
def test_a_pass_of_more_than_16_sequences_generates_and_evicts(path: Path, what: str) -> None:
    context_of = context_params()
    context_of.n_ctx, context_of.n_seq_max, context_of.n_outputs_max = MANY * 256, MANY, MANY
    model_of = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_of)
    context = llama_cpp.llama_init_from_model(model, context_of)
    expected = answers_of_many(context)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)

    sessions: list[FlashSession] = []
    driver = EngineDriver({"what": what, "warm_start": False, "reserve": "8MiB"}, sessions.append)
    model = driver.load(str(path), llama_cpp.llama_model_default_params(), context_of)
    context = driver.init(model, context_of)
    assert context, driver.failure
    (session,) = sessions
    share = session.share
    session.set_budget(session.memory.fixed + (8 << 20) + share.least + (share.most - share.least) // 4)
    for found, wanted in zip(answers_of_many(context, driver), expected, strict=True):
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))
    stats = session.stats()
    assert stats.decode.calls == ROUNDS and stats.decode.bytes_read > 0
    assert (stats.decode.evictions > 0) == (path == SHIPPED), "experts are evicted, panels stream"
    assert share.decoding, "what only prompts need is not lent"
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    driver.freed(model)


@pytest.mark.parametrize("n_ctx", [1024, 16384])
def test_graphs_of_many_sequences_use_weights_as_those_of_one(n_ctx: int) -> None:
    meta = read_gguf(SHIPPED)
    one = graphs_of(meta, ContextShape(n_ctx=n_ctx))
    many = graphs_of(meta, ContextShape(n_ctx=n_ctx, n_outputs=N, n_sequences=N))
    assert many.uses == one.uses
    assert many.kv == one.kv and many.compute <= one.compute + (1 << 20)
    planned = estimate(meta, ContextShape(n_ctx=n_ctx, n_outputs=N, n_sequences=N))
    assert planned.kv >= many.kv and planned.compute >= many.compute
