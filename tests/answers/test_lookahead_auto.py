"""lookahead="auto": the same answers, whatever is tried, and what was read ahead is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from engines import logits_of, open_flash, tokens

from llama_flash import FlashOffload

HALF = 0.5
# tokens until the first trial is over: 16, then 4 times 10 (plugin/src/ops/trial.h)
TRIED = 56


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", ["Q4_0", "F16"])
def test_answers_stay_the_same_while_it_is_tried(kind: str, model_file: ModelFile) -> None:
    path, prompt, decoded = model_file("qwen3moe", kind), tokens(20, seed=1), tokens(TRIED + 24, seed=2)
    logits, ahead = [], []
    for lookahead in ("auto", True, False):
        with open_flash(path, share=HALF, lookahead=lookahead) as llm:
            logits.append(logits_of(llm, prompt, decoded))
            ahead.append(llm.flash.stats().total.experts_expected)
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])
    assert 0 < ahead[0] < ahead[1] and ahead[2] == 0, "a third of these tokens were decoded without, at least"


def test_what_was_read_ahead_and_then_used_is_counted(model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe"), share=HALF, lookahead=True) as llm:
        llm.eval(tokens(20, seed=1))
        for token in tokens(40, seed=2):
            llm.eval([token])
        stats = llm.flash.stats()
    assert 0 < stats.total.experts_foreseen <= stats.total.experts_expected
    assert stats.reads_ahead == stats.as_dict()["reads_ahead"] == 2
    assert stats.decode.as_dict()["experts_foreseen"] == stats.decode.experts_foreseen > 0


@pytest.mark.parametrize(("lookahead", "what", "on"), [(True, "experts", 2), (False, "experts", 0)])
def test_what_was_chosen_by_hand_stays(lookahead: bool, what: Any, on: int, model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe"), what=what, share=HALF, lookahead=lookahead) as llm:
        for token in tokens(TRIED + 8, seed=2):
            llm.eval([token])
        assert llm.flash.stats().reads_ahead == on


def test_a_dense_model_has_nothing_to_read_ahead(model_file: ModelFile) -> None:
    with open_flash(model_file("llama"), lookahead="auto") as llm:
        for token in tokens(8, seed=2):
            llm.eval([token])
        stats = llm.flash.stats()
    assert stats.reads_ahead == 0 and stats.total.experts_expected == 0


def test_auto_is_the_default_and_begins_by_reading_ahead(model_file: ModelFile) -> None:
    assert FlashOffload().lookahead == "auto"
    with open_flash(model_file("qwen3moe"), share=HALF, lookahead="auto") as llm:
        assert llm.flash.stats().reads_ahead == 2
        llm.eval(tokens(20, seed=1))
        llm.eval(tokens(1, seed=2))
        llm.eval(tokens(1, seed=3))
        assert llm.flash.stats().total.experts_expected > 0
