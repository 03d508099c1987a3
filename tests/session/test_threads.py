"""Several threads at one session: contexts that take turns, statistics and memory in between. Answers stay the same."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from background import meanwhile
from conftest import ModelFile
from engines import LEAST, QUARTER, Logits, assert_same_logits, give_memory, logits_of, open_flash, tokens
from fault_scenarios import hidden_tail

from llama_flash import FlashReadError

PROMPT, DECODED = tokens(60, seed=1), tokens(8, seed=2)
N = len(PROMPT) + len(DECODED)

pytestmark = pytest.mark.sanitize


@contextmanager
def second_context(llm: Any) -> Iterator[Any]:
    context = llama_cpp.llama_init_from_model(llm._model.model, llm.context_params)
    assert context
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)


class Stopped(Exception):
    """llama_decode has failed."""


def decode(context: Any, n_vocab: int) -> Logits:
    """As logits_of, on a bare context: logits of the last token of the prompt, then of each decoded one."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    rows = []
    for part in (PROMPT, *([token] for token in DECODED)):
        array = (llama_cpp.llama_token * len(part))(*part)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(part))) != 0:
            raise Stopped
        pointer = llama_cpp.llama_get_logits_ith(context, -1)
        rows.append(np.array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * n_vocab)).contents, copy=True))
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("form", ["qwen3moe", "llama"])
def test_contexts_of_one_model_take_turns(form: str, model_file: ModelFile) -> None:
    with open_flash(model_file(form, "Q4_0"), share=LEAST) as llm, second_context(llm) as other:
        expected = logits_of(llm, PROMPT, DECODED)

        def decode_other() -> None:
            actual = decode(other, expected.shape[1])
            assert (actual == expected[len(PROMPT) - 1 :]).all()

        decode_other()
        with meanwhile(decode_other):
            for _ in range(3):
                assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


@pytest.mark.parametrize("form", ["qwen3moe", "llama"])
def test_contexts_of_one_model_fail_together(form: str, model_file: ModelFile, tmp_path: Path) -> None:
    path = Path(shutil.copy(model_file(form, "Q4_0"), tmp_path))
    with open_flash(path, share=LEAST) as llm, second_context(llm) as other:
        n_vocab = logits_of(llm, PROMPT, DECODED).shape[1]

        def decode_other() -> None:
            with pytest.raises(Stopped):  # by its own reads or by those of llm
                decode(other, n_vocab)

        with hidden_tail(path), meanwhile(decode_other):
            for _ in range(50):
                with pytest.raises(FlashReadError):
                    logits_of(llm, PROMPT, DECODED)


@pytest.mark.parametrize("form", ["qwen3moe", "llama"])
def test_statistics_and_memory_may_change_while_a_model_decodes(form: str, model_file: ModelFile) -> None:
    with open_flash(model_file(form, "Q4_0"), share=QUARTER) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        shares = [LEAST, 0.3, 0.7]

        def disturb() -> None:
            shares.append(shares.pop(0))
            give_memory(llm, shares[0])
            assert llm.flash.stats().total.bytes_read > 0

        with meanwhile(disturb):
            for _ in range(3):
                assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


def test_models_decode_side_by_side(model_file: ModelFile) -> None:
    with (
        open_flash(model_file("qwen3moe", "Q4_0"), share=LEAST) as one,
        open_flash(model_file("llama", "Q8_0"), share=LEAST, io_engine="pread") as two,
    ):
        expected_one, expected_two = logits_of(one, PROMPT, DECODED), logits_of(two, PROMPT, DECODED)
        with meanwhile(lambda: assert_same_logits(logits_of(two, PROMPT, DECODED), expected_two, N)):
            for _ in range(3):
                assert_same_logits(logits_of(one, PROMPT, DECODED), expected_one, N)
