"""OPT models give the logits of Hugging Face's modeling_opt.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import logits_of, open_resident
from numpy_models import F32_ATTENTION, N_VOCAB, TinyModel, activation, assert_close

PRE_NORM = TinyModel("opt", activation("relu", gated=False))
VARIANTS = {
    "norms before": PRE_NORM,
    "norms after and projected embeddings, as opt-350m": replace(PRE_NORM, post_norm=True, n_embd_proj=32),
    "projected embeddings": replace(PRE_NORM, n_embd_proj=32),
    "an output matrix of its own": replace(PRE_NORM, tied=False),
    "positions from row 0": replace(PRE_NORM, position_offset=0),
}
TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, N_VOCAB, 48)]
PROMPT, DECODED = TOKENS[:40], TOKENS[40:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_hugging_face(variant: str, tmp_path: Path) -> None:
    model = VARIANTS[variant]
    with open_resident(model.write(tmp_path / "opt.gguf"), **F32_ATTENTION) as llm:
        assert_close(logits_of(llm, PROMPT, DECODED), model.logits(TOKENS))


def test_positions_matter(tmp_path: Path) -> None:
    """Else a wrong row of the table would go unnoticed above."""
    shifted = replace(PRE_NORM, position_offset=3).logits(TOKENS)
    assert np.abs(shifted - PRE_NORM.logits(TOKENS)).max() > 0.1


def test_a_context_longer_than_the_position_table_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = PRE_NORM.write(tmp_path / "opt.gguf")
    with pytest.raises(ValueError, match="context"):
        open_resident(path, n_ctx=512, verbose=True)
    assert "a context of 512 tokens is longer than the model's table of 256 positions" in capfd.readouterr().err


def test_a_table_shorter_than_the_smallest_context_is_not_read_past_its_end(tmp_path: Path) -> None:
    model = replace(PRE_NORM, n_ctx_train=30)
    with open_resident(model.write(tmp_path / "opt.gguf"), **F32_ATTENTION) as llm:
        assert_close(logits_of(llm, PROMPT, DECODED), model.logits(TOKENS))
