"""Experts read ahead of the next layer's router: the same answers, and something is read."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ModelFile
from engines import LEAST, logits_of, open_flash, tokens

from gguf_tools.synthetic import MOE_FORMS

HALF = 0.5  # with less, shared experts leave no slots to the others
# their experts look at something else than their routers do
WITHOUT = {"smallthinker"}


@pytest.mark.sanitize
@pytest.mark.parametrize("form", MOE_FORMS)
def test_the_next_layers_experts_are_read_ahead_and_answers_stay_the_same(form: str, model_file: ModelFile) -> None:
    path, prompt, decoded = model_file(form), tokens(20, seed=1), tokens(24, seed=2)
    logits = []
    for lookahead in (True, False):
        with open_flash(path, share=HALF, lookahead=lookahead) as llm:
            logits.append(logits_of(llm, prompt, decoded))
            ahead = llm.flash.stats().total.experts_expected
        assert (ahead > 0) == (lookahead and form not in WITHOUT), f"{ahead} read ahead"
    assert np.array_equal(*logits)


def test_a_batch_is_not_looked_ahead_of(model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe"), share=LEAST) as llm:
        llm.eval(tokens(200, seed=3))
        assert llm.flash.stats().total.experts_expected == 0
