"""Prompts seen before: what is read is what would have been computed, bit for bit; what is not there is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import write
from conftest import ModelFile
from engines import Logits, Model, tokens
from prompts import N_CTX, PROMPT, answer, open_model

from llama_flash import FlashOffload
from llama_flash.prompts.folder import Folder
from llama_flash.prompts.heads import BLOCK
from llama_flash.prompts.listing import verify


def asked(path: Path, folder: Path | bool, prompt: list[int], **options: Any) -> tuple[list[int], Logits, int]:
    """An answer of a fresh process' Llama, and the tokens that came from the store."""
    with open_model(path, folder, **options) as llm:
        text, logits = answer(llm, prompt)
        return text, logits, llm.flash.prompts.stats.recalled if llm.flash.prompts else 0


def assert_restored(path: Path, folder: Path, n: int = 2 * BLOCK, **options: Any) -> None:
    """The second time the prompt is read, and all that follows has the same bits as when it was computed."""
    text, logits, recalled = asked(path, folder, PROMPT, **options)
    assert recalled == 0 and np.isfinite(logits).all() and logits.std(axis=1).min() > 0
    again, restored, recalled = asked(path, folder, PROMPT, **options)
    assert recalled == n
    assert again == text
    assert logits.shape == restored.shape and (logits.view(np.uint32) == restored.view(np.uint32)).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


@pytest.fixture(scope="module")
def architecture(model_folder: Path) -> Iterator[Any]:
    def make(name: str) -> Path:
        path = model_folder / f"{name}.gguf"
        if not path.exists():
            write(name, path)
        return path

    yield make


@pytest.mark.parametrize("form", ["llama", "qwen3moe"])
def test_what_is_read_is_what_was_computed(form: str, model_file: ModelFile, folder: Path) -> None:
    assert_restored(model_file(form), folder)


def test_it_is_so_with_a_quantised_cache(model_file: ModelFile, folder: Path) -> None:
    assert_restored(model_file("llama"), folder, flash_attn=True, type_k=8, type_v=8)
    assert_restored(model_file("qwen3moe"), folder, type_k=8)


@pytest.mark.parametrize(
    "name",
    ["gemma3", "mamba2", "jamba", *(pytest.param(name, marks=pytest.mark.full) for name in ("gpt-oss", "rwkv7"))],
)
def test_it_is_so_with_windows_and_recurrent_states(name: str, architecture: Any, folder: Path) -> None:
    assert_restored(architecture(name), folder)


def test_a_window_that_was_overwritten_is_not_kept(architecture: Any, folder: Path) -> None:
    assert_restored(architecture("gemma3"), folder, swa_full=False)
    kept = {path.suffix for path in folder.iterdir()}
    assert kept == {".cells", ".window"}


def test_a_prompt_that_parts_is_read_up_to_there(model_file: ModelFile, folder: Path) -> None:
    path = model_file("llama")
    asked(path, folder, PROMPT)
    parted = PROMPT[:400] + tokens(300, seed=4)
    expected, logits, _ = asked(path, False, parted)
    text, restored, recalled = asked(path, folder, parted)
    assert (text, recalled) == (expected, BLOCK)
    assert (logits.view(np.uint32) == restored.view(np.uint32)).all()
    with open_model(path, folder) as llm:  # and beyond what is in memory
        answer(llm, parted)
        text, restored = answer(llm, PROMPT)
        stats = llm.flash.stats().prompts
        assert stats.recalled == 2 * BLOCK + (2 * BLOCK - 400)  # of which the first 400 were there
        assert (stats.asked, stats.found) == (2, 2) and stats.folder == str(folder)
        assert str(stats) in str(llm.flash.stats())
    assert text == asked(path, False, PROMPT)[0]


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_a_conversation_goes_on_from_its_own_state(name: str, architecture: Any, folder: Path) -> None:
    """What cannot be taken back is neither computed nor read again for the next turn."""
    path = architecture(name)
    with open_model(path, folder) as llm:
        first, _ = answer(llm, PROMPT)
        in_context = PROMPT + first[:-1]  # the last token was not computed
        before = llm.flash.stats().total.tokens
        second, _ = answer(llm, in_context + tokens(20, seed=6), 4)
        assert llm.flash.stats().total.tokens - before == 20 + 3
    with open_model(path, False) as llm:
        answer(llm, PROMPT)
        llm.eval(tokens(20, seed=6))
        assert int(np.argmax(llm.scores[llm.n_tokens - 1])) == second[0]


def test_other_parameters_are_another_prompt(model_file: ModelFile, folder: Path) -> None:
    path = model_file("llama")
    asked(path, folder, PROMPT)
    for options in ({"rope_freq_scale": 0.5}, {"type_k": 8}, {"flash_attn": True}):
        assert asked(path, folder, PROMPT, **options)[2] == 0
    assert asked(model_file("llama", "Q8_0", 1, 1), folder, PROMPT)[2] == 0
    assert asked(path, folder, PROMPT, n_ctx=2048, n_batch=128, n_threads=1)[2] == 2 * BLOCK


def test_files_stay_within_their_size(model_file: ModelFile, folder: Path) -> None:
    flash = FlashOffload(prompt_cache=folder, prompt_cache_size="2MiB", follow=False)
    with Model(str(model_file("llama")), n_ctx=N_CTX, flash_offload=flash, verbose=False) as llm:
        for seed in range(8):
            answer_of = tokens(600, seed=seed)
            list(islice(llm.generate(answer_of, temp=0.0), 2))
            llm.flash.keeper.flush()
            assert sum(file.stat().st_blocks * 512 for file in folder.iterdir()) <= (2 << 20) + (1 << 20)


def test_what_was_brought_by_a_saved_state_is_not_kept(model_file: ModelFile, folder: Path) -> None:
    with open_model(model_file("llama"), False) as llm:
        llm.eval(PROMPT)
        state = llm.save_state()
    with open_model(model_file("llama"), folder) as llm:
        llm.load_state(state)
        list(islice(llm.generate([*PROMPT, 5, 6], temp=0.0), 3))
    assert list(folder.iterdir()) == []


def test_it_is_written_while_nobody_asks(model_file: ModelFile, folder: Path) -> None:
    with open_model(model_file("llama"), folder) as llm:
        stream = llm.generate(PROMPT, temp=0.0)
        next(stream)
        time.sleep(0.2)
        assert list(folder.iterdir()) == []  # the answer has not ended
        stream.close()
        end = time.monotonic() + 60
        while len(list(folder.glob("*.cells"))) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert len(list(folder.glob("*.cells"))) == 3  # two blocks, and the rest


def test_nothing_is_kept_unless_asked_for(model_file: ModelFile, tmp_path: Path) -> None:
    with open_model(model_file("llama"), False) as llm:
        answer(llm, PROMPT)
        assert llm.flash.prompts is None and llm.flash.keeper is None


def test_two_share_a_folder(model_file: ModelFile, folder: Path) -> None:
    path = model_file("llama")
    with open_model(path, folder) as one, open_model(path, folder) as other:
        text, _ = answer(one, PROMPT)
        assert answer(other, PROMPT)[0] == text  # both have the same to write
        for llm in (one, other):
            llm.flash.keeper.flush()
    assert len(list(folder.iterdir())) == 3 and list(verify(Folder(folder))) == []
    assert asked(path, folder, PROMPT)[2] == 2 * BLOCK
