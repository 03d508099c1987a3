"""Everything else of llama_cpp.Llama gives the same results with weights on flash."""

from __future__ import annotations

import contextlib
import os
import pickle
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from engines import (
    LEAST,
    assert_read_from_flash,
    assert_same_logits,
    give_memory,
    logits_of,
    open_flash,
    open_resident,
    tokens,
)
from llama_cpp import Llama, LlamaGrammar
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from lora import write_lora

FORMS = ("llama", "qwen3moe")
SAMPLING: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "seed": 3}


def text_of(llm: Llama, **options: Any) -> str:
    return str(llm("def main(argv):", **(SAMPLING | options))["choices"][0]["text"])


@pytest.mark.parametrize("form", FORMS)
def test_text_is_the_same(form: str, model_file: ModelFile) -> None:
    path = model_file(form, "Q4_0")
    with open_resident(path, logits_all=False) as resident:
        expected = text_of(resident)
    with open_flash(path, logits_all=False) as llm:
        assert text_of(llm) == expected != ""
        assert_read_from_flash(llm, moe=form == "qwen3moe")


def test_streamed_text_is_the_same(model_file: ModelFile) -> None:
    path = model_file("qwen3moe", "Q4_0")
    with open_resident(path, logits_all=False) as resident:
        expected = text_of(resident)
    with open_flash(path, logits_all=False) as llm:
        chunks = [chunk["choices"][0]["text"] for chunk in llm("def main(argv):", stream=True, **SAMPLING)]
        assert len(chunks) > 4 and "".join(chunks) == expected


def test_chat_is_the_same(model_file: ModelFile) -> None:
    path = model_file("qwen3moe", "Q4_0")
    messages = [{"role": "user", "content": "What is a flash tensor?"}]
    answers = []
    for opened in (open_resident, open_flash):
        with opened(path, logits_all=False, chat_format="chatml") as llm:
            answers.append(llm.create_chat_completion(messages, **SAMPLING)["choices"][0]["message"]["content"])
    assert answers[0] == answers[1] != ""


def test_a_grammar_holds(model_file: ModelFile) -> None:
    path = model_file("qwen3moe", "Q4_0")
    texts = []
    for opened in (open_resident, open_flash):
        with opened(path, logits_all=False) as llm:
            texts.append(text_of(llm, grammar=LlamaGrammar.from_string("root ::= [a-f]+", verbose=False)))
    assert texts[0] == texts[1] != ""
    assert set(texts[0]) <= set("abcdef")


def test_a_grammar_that_grows_without_end_is_an_error_and_ends_nothing() -> None:
    # with each token there are twice as many ways to go on
    grows = LlamaGrammar.from_string('root ::= "a" root "b" | "a" root "c"', verbose=False)
    shipped = resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"
    with closing(Llama(str(shipped), n_ctx=256, flash_offload=True, verbose=False)) as llm:
        before = text_of(llm)
        with pytest.raises(ValueError, match="no token can be sampled"):
            text_of(llm, grammar=grows, max_tokens=200)
        assert text_of(llm) == before


def test_draft_model_gives_the_same_text(model_file: ModelFile) -> None:
    path = model_file("qwen3moe", "Q8_0")
    texts = []
    for opened in (open_resident, open_flash):
        draft = LlamaPromptLookupDecoding(num_pred_tokens=4)
        with opened(path, draft_model=draft, logits_all=False, n_batch=16) as llm:  # fewer than tokens in the end
            texts.append(llm("ababababababababab", max_tokens=24, temperature=0.0)["choices"][0]["text"])
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_are_bit_identical(form: str, model_file: ModelFile) -> None:
    path = model_file(form, "Q8_0")
    vectors = []
    for opened in (open_resident, open_flash):
        with opened(path, embedding=True, logits_all=False) as llm:
            vectors.append(np.array(llm.create_embedding("weights on flash")["data"][0]["embedding"]))
    assert vectors[0].size > 0 and np.isfinite(vectors[0]).all() and vectors[0].std() > 0
    assert np.array_equal(vectors[0], vectors[1])


def test_a_saved_state_goes_on_with_the_same_logits(model_file: ModelFile) -> None:
    path, prompt, decoded = model_file("qwen3moe", "Q4_0"), tokens(64, seed=1), tokens(16, seed=2)
    with open_resident(path) as resident:
        expected = logits_of(resident, prompt, decoded)
    with open_flash(path) as llm:
        logits_of(llm, prompt, decoded[:4])
        state = llm.save_state()
        logits_of(llm, tokens(40, seed=9), [])
        llm.load_state(state)
        for token in decoded[4:]:
            llm.eval([token])
        assert_same_logits(np.array(llm.scores[:80]), expected, 80)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("llama", ["blk.0.ffn_up.weight", "blk.1.ffn_down.weight", "blk.2.attn_q.weight"]),
        ("qwen3moe", ["blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight", "blk.2.attn_q.weight"]),
    ],
)
def test_lora_gives_the_same_logits(form: str, names: list[str], model_file: ModelFile, tmp_path: Path) -> None:
    path, prompt = model_file(form, "Q8_0"), tokens(80, seed=1)
    adapter = tmp_path / "lora.gguf"
    write_lora(path, adapter, names)
    with open_resident(path) as resident:
        plain = logits_of(resident, prompt, [])
    with open_resident(path, lora_path=str(adapter)) as resident:
        expected = logits_of(resident, prompt, [])
    assert not np.array_equal(plain, expected), "the adapter does nothing"
    with open_flash(path, lora_path=str(adapter)) as llm:
        assert_same_logits(logits_of(llm, prompt, []), expected, 80)


def test_two_models_in_one_process_do_not_disturb_each_other(model_file: ModelFile) -> None:
    paths = [model_file("qwen3moe", "Q4_0"), model_file("llama", "Q8_0")]
    prompt, decoded = tokens(70, seed=1), tokens(16, seed=2)
    expected = []
    for path in paths:
        with open_resident(path) as resident:
            expected.append(logits_of(resident, prompt, decoded))
    with open_flash(paths[0]) as first, open_flash(paths[1], share=LEAST) as second:
        for llm in (first, second):
            llm.reset()
            llm.eval(prompt)
        for token in decoded:  # in turns
            first.eval([token])
            second.eval([token])
        assert_same_logits(np.array(first.scores[:86]), expected[0], 86)
        assert_same_logits(np.array(second.scores[:86]), expected[1], 86)


def test_flash_and_stock_models_live_side_by_side(model_file: ModelFile) -> None:
    path, prompt = model_file("qwen3moe", "Q4_0"), tokens(80, seed=1)
    with open_flash(path) as flash, open_resident(path) as resident:
        assert resident.flash is None
        assert_same_logits(logits_of(flash, prompt, []), logits_of(resident, prompt, []), 80)


def test_a_closed_model_releases_its_files_and_can_be_opened_again(model_file: ModelFile) -> None:
    path, prompt = model_file("qwen3moe", "Q4_0"), tokens(80, seed=1)

    def open_files() -> list[str]:
        targets = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # other threads open and close files of their own at any time
                targets.append(os.readlink(link))
        return [target for target in targets if target == str(path)]

    results = []
    for _ in range(2):
        llm = open_flash(path)
        results.append(logits_of(llm, prompt, []))
        assert open_files()
        llm.close()
        llm.close()
        assert not open_files()
        assert llm.flash.stats().total.bytes_read > 0, "the numbers outlive the model"
    assert_same_logits(results[1], results[0], 80)


def test_a_pickled_model_stays_on_flash(model_file: ModelFile) -> None:
    path, prompt = model_file("qwen3moe", "Q4_0"), tokens(80, seed=1)
    with open_flash(path) as llm:
        expected = logits_of(llm, prompt, [])
        pickled = pickle.dumps(llm)
    copy: Any = pickle.loads(pickled)
    try:
        give_memory(copy, LEAST)
        assert_same_logits(logits_of(copy, prompt, []), expected, 80)
        assert_read_from_flash(copy, moe=True)
    finally:
        copy.close()


def test_a_generation_that_was_ended_leaves_nothing_behind(model_file: ModelFile) -> None:
    class Ended(Exception):
        pass

    path, calls = model_file("qwen3moe", "Q4_0"), 0

    def end() -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise Ended

    with open_flash(path, logits_all=False) as llm:
        expected = text_of(llm, temperature=0.0)
        llm.flash.on_call(end)
        for n in (2, 1, 4):
            llm.reset()
            calls = n
            with pytest.raises(Ended):
                text_of(llm, temperature=0.0)
            assert text_of(llm, temperature=0.0) == expected, n
