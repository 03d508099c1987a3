"""What a session does with the memory it is given, and what a prompt leaves behind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelFile
from engines import LEAST, QUARTER, assert_same_logits, give_memory, logits_of, open_flash, tokens

from gguf_tools.synthetic import tiny, write
from llama_flash import FlashError
from llama_flash.native import bindings


def _memory(llm: Any) -> bindings.llama_flash_memory:
    return llm.flash.native.memory()


@pytest.mark.parametrize("form", ["qwen3moe", "deepseek2", "llama"])
def test_the_parts_never_exceed_the_memory_given(form: str, model_file: ModelFile) -> None:
    """Experts and panels together, from the smallest memory that works to more than everything."""
    with open_flash(model_file(form, "Q4_0"), what="all") as llm:
        for share in (LEAST, 0.001, 0.01, 0.05, 0.1, QUARTER, 0.5, 0.75, 0.9, 0.99, 1.0, 2.0):
            given = give_memory(llm, share)
            memory = _memory(llm)
            parts = memory.slots + memory.pinned + memory.stream + memory.bookkeeping
            assert parts <= given == memory.total, (share, given, parts)


def reads(session: Any) -> int:
    """Of what is kept: rows of tables are not."""
    total = session.stats().total
    return int(total.reads - total.rows_read)


def test_memory_is_divided_as_told_before(model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe", "Q4_0"), what="all") as llm:
        native = llm.flash.native
        for share in (LEAST, 0.05, QUARTER, 0.9, 2.0):
            given = give_memory(llm, share)
            assert bytes(native.divide(given)) == bytes(_memory(llm))
        few = native.requirements().min_memory - 1
        with pytest.raises(FlashError, match=f"{few} bytes"):
            native.divide(few)


def test_memory_for_everything_reads_each_weight_once(model_file: ModelFile) -> None:
    prompt, decoded = tokens(70, seed=1), tokens(6, seed=2)
    with open_flash(model_file("qwen3moe", "Q4_0"), what="all") as llm:
        session = llm.flash
        needs = session.native.requirements()
        session.native.set_memory(needs.max_memory)
        memory = _memory(llm)
        assert memory.n_slots == needs.n_experts and memory.n_pinned == needs.n_panels
        logits_of(llm, prompt, decoded)
        first = reads(session)
        for seed in range(3, 6):
            logits_of(llm, tokens(70, seed=seed), decoded)
        again = reads(session)
        assert again - first <= needs.n_experts, "only experts that no token had used before are read"
        logits_of(llm, prompt, decoded)
        assert reads(session) == again


def test_a_prompt_does_not_throw_out_what_decoding_uses(model_file: ModelFile) -> None:
    """A token's experts are all in slots after it was decoded, and still are after a prompt that uses every expert."""
    with open_flash(model_file("qwen3moe", "Q4_0"), share=0.6) as llm:
        llm.eval(tokens(2, seed=1))
        for _ in range(12):  # one token over and over: its experts are the most used ones
            llm.reset()
            llm.eval([7])
        before = llm.flash.stats().total.misses
        llm.reset()
        llm.eval([7])
        assert llm.flash.stats().total.misses == before
        llm.reset()
        llm.eval(tokens(400, seed=3))
        before = llm.flash.stats().total.misses
        llm.reset()
        llm.eval([7])
        assert llm.flash.stats().total.misses == before


def test_all_layers_keep_their_experts_after_a_prompt(tmp_path: Path) -> None:
    """The last layer computes only the tokens whose output is wanted; its experts must not age faster for that."""
    path, *_ = write(replace(tiny("qwen3moe", "Q4_0"), popularity=0.9), tmp_path / "skewed.gguf")
    text = tokens(64, seed=5)
    with open_flash(path, share=0.5, logits_all=False) as llm:

        def misses_per_token() -> float:
            before = llm.flash.stats().total.misses
            llm.reset()
            for token in text:
                llm.eval([token])
            return (llm.flash.stats().total.misses - before) / len(text)

        misses_per_token()
        settled = misses_per_token()
        llm.reset()
        llm.eval(tokens(500, seed=6))
        misses_per_token()
        assert misses_per_token() <= 1.2 * settled


def test_decoding_in_a_forked_child_is_an_error(model_file: ModelFile) -> None:
    prompt, decoded = tokens(70, seed=1), tokens(4, seed=2)
    with open_flash(model_file("qwen3moe", "Q4_0"), share=LEAST, n_threads=1) as llm:
        expected = logits_of(llm, prompt, decoded)
        child = os.fork()
        if child == 0:
            try:
                llm.reset()
                llm.eval([1])
            except FlashError as error:
                os._exit(0 if "fork" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert_same_logits(logits_of(llm, prompt, decoded), expected, len(prompt) + len(decoded))
