"""What a text has behind its last whole block is kept, too, so that a chat's next turn computes only what is new."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import ModelFile
from engines import Logits, tokens
from hypothesis import given
from hypothesis import strategies as st
from prompts import answer, open_model

from llama_flash.prompts.folder import Folder
from llama_flash.prompts.heads import BLOCK, SHORTEST, beginnings_of, heads_of, rest_of
from llama_flash.prompts.listing import prompts_of, verify

NEW = tokens(40, seed=9)  # of the next turn


def turn(path: Path, folder: Path | bool, prompt: list[int]) -> tuple[list[int], Logits, int]:
    """An answer of a fresh process' Llama, all logits that were computed for it, and the tokens from the store."""
    with open_model(path, folder) as llm:
        text, _ = answer(llm, prompt)
        recalled = llm.flash.prompts.stats.recalled if llm.flash.prompts else 0
        first = len(prompt) - len(NEW)
        return text, np.array(llm.scores[first : llm.n_tokens], copy=True), recalled


@pytest.mark.parametrize("n", [SHORTEST + 1, 100, BLOCK - 24, BLOCK, BLOCK + 60, 2 * BLOCK + 200])
@pytest.mark.parametrize("form", ["llama", "qwen3moe"])
def test_the_next_turn_computes_only_what_is_new(form: str, n: int, model_file: ModelFile, tmp_path: Path) -> None:
    path, folder = model_file(form), tmp_path / "prompts"
    prompt = tokens(n, seed=n)
    text, _, recalled = turn(path, folder, prompt)
    assert recalled == 0
    held = len(prompt) + len(text) - 1  # the last token of an answer is not computed
    following = prompt + text[:-1] + NEW
    expected, logits, _ = turn(path, False, following)
    said, restored, recalled = turn(path, folder, following)
    rest = held % BLOCK
    assert recalled == (held if rest == 0 or rest >= SHORTEST else held - rest)
    assert said == expected
    assert (logits.view(np.uint32) == restored.view(np.uint32)).all()
    kept = Folder(folder)
    assert list(verify(kept)) == []
    (listed,) = prompts_of(kept)  # the shorter text is a part of the longer one
    assert listed.tokens >= len(following)
    kept.close()


@pytest.mark.parametrize(("at", "n"), [(10, 1), (300, 1), (4090, 1), (4096, 1), (-5000, 1), (-4096, 4096), (-8192, 0)])
def test_a_damaged_rest_is_computed(
    at: int, n: int, model_file: ModelFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So many bytes are changed; none: all from there on are cut off."""
    path, folder = model_file("llama"), tmp_path / "prompts"
    prompt = tokens(BLOCK + 60, seed=1)
    text, _, _ = turn(path, folder, prompt)
    rest = min(folder.iterdir(), key=lambda file: file.stat().st_size)
    data = np.fromfile(rest, np.uint8)
    at %= len(data)
    data[at : at + n] ^= 1
    rest.write_bytes(data[: None if n else at].tobytes())
    following = prompt + text[:-1] + NEW
    expected, logits, _ = turn(path, False, following)
    said, computed, recalled = turn(path, folder, following)
    assert recalled == BLOCK
    assert said == expected
    assert (logits.view(np.uint32) == computed.view(np.uint32)).all()
    assert rest.name in caplog.text and "damaged" in caplog.text


def test_another_rest_is_not_taken(model_file: ModelFile, tmp_path: Path) -> None:
    path, folder = model_file("llama"), tmp_path / "prompts"
    prompt = tokens(BLOCK + 60, seed=1)
    turn(path, folder, prompt)
    other = prompt[:-30] + tokens(60, seed=2)
    expected, logits, _ = turn(path, False, other)
    said, computed, recalled = turn(path, folder, other)
    assert recalled == BLOCK
    assert said == expected
    assert (logits.view(np.uint32) == computed.view(np.uint32)).all()


@given(st.integers(0, 3 * BLOCK), st.integers(0, 3 * BLOCK))
def test_a_longer_text_finds_what_a_shorter_one_has_left(short: int, more: int) -> None:
    text = np.arange(short + more, dtype=np.int32)

    def rest(n: int, before: int) -> bytes | None:
        last = list(heads_of(b"identity", "", text[:before]))[-1:]
        found = rest_of(b"identity", "", text[:n], last[0] if last else None)
        return found.key if found else None

    left = rest(short, short)
    blocks = list(heads_of(b"identity", "", text))
    whole = short // BLOCK
    if whole < len(blocks):  # the block that the rest has become a part of
        keys = [head.key for head in beginnings_of(blocks[whole])]
    else:
        last = rest_of(b"identity", "", text, blocks[-1] if blocks else None)
        keys = [last.key, *(head.key for head in beginnings_of(last))] if last else []
    assert (left in keys) == (left is not None)
    assert len(set(keys)) == len(keys)
