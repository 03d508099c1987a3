"""Logits are the same bits with weights on flash and without: whole arrays, prompts and single tokens.

Not the whole product of forms, types, batches, threads, budgets, shards and engines, but every pair of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from engines import (
    IO_ENGINES,
    LEAST,
    MOST,
    QUARTER,
    assert_read_from_flash,
    assert_same_logits,
    logits_of,
    open_flash,
    open_resident,
    tokens,
)
from gguf import GGUFReader
from llama_cpp import llama_cpp
from pairwise import missing_pairs, pairwise

from gguf_tools.routing import trace_routing
from gguf_tools.synthetic import ARCHITECTURES, MOE_FORMS, tiny, write

FACTORS: dict[str, tuple[Any, ...]] = {
    "form": tuple(ARCHITECTURES),
    "quantisation": ("F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4"),
    "n_ubatch": (1, 32, 512),
    "n_threads": (1, 2),
    "share": (LEAST, QUARTER, MOST),
    "n_shards": (1, 3),
    "io_engine": IO_ENGINES,
    "what": ("auto", "all"),
}
CASES = pairwise(FACTORS)
PROMPT = {1: 56, 32: 90, 512: 530}  # by n_ubatch: whole batches and a rest
DECODED = 12


def test_the_cases_cover_every_pair() -> None:
    assert not missing_pairs(CASES, FACTORS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_logits_are_bit_identical(case: dict[str, Any], model_folder: Path) -> None:
    case = dict(case)
    form, quantisation, n_shards = case.pop("form"), case.pop("quantisation"), case.pop("n_shards")
    path, *rest = write(tiny(form, quantisation), model_folder / "case.gguf", n_shards=n_shards)
    try:
        flash = {key: case.pop(key) for key in ("share", "io_engine", "what")}
        prompt, decoded = tokens(PROMPT[case["n_ubatch"]], seed=1), tokens(DECODED, seed=2)
        with open_resident(path, **case) as resident:
            expected = logits_of(resident, prompt, decoded)
        with open_flash(path, **flash, **case) as llm:
            actual = logits_of(llm, prompt, decoded)
            again = logits_of(llm, prompt, decoded)  # with what the first pass has left in the slots
            assert llm.flash.stats().io_engine == flash["io_engine"]
            assert_read_from_flash(llm, moe=form in MOE_FORMS)
        assert_same_logits(actual, expected, len(prompt) + DECODED)
        assert_same_logits(again, expected, len(prompt) + DECODED)
    finally:
        for file in (path, *rest):
            file.unlink()


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"])
def test_repacking_keeps_the_weights(quantisation: str, model_file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash and resident repack alike: only weights as the file has them can tell. Sums are in another order there."""
    path, prompt, decoded = model_file("qwen3moe", quantisation), tokens(54, seed=1), tokens(DECODED, seed=2)
    with open_resident(path) as llm:
        repacked = logits_of(llm, prompt, decoded)
    defaults = llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama_cpp, "llama_model_default_params", without_repacking)
    with open_resident(path) as llm:
        expected = logits_of(llm, prompt, decoded)
    assert repacked.shape == expected.shape
    assert np.linalg.norm(repacked - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("quantisation", ["Q4_K_M", "Q5_K_M"])
@pytest.mark.parametrize("form", ["llama", "qwen3moe"])
def test_logits_are_bit_identical_when_layers_differ_in_type(
    form: str, quantisation: str, model_file: ModelFile
) -> None:
    path, prompt, decoded = model_file(form, quantisation), tokens(90, seed=1), tokens(DECODED, seed=2)
    with open_resident(path) as resident:
        expected = logits_of(resident, prompt, decoded)
    with open_flash(path, what="all") as llm:
        assert_same_logits(logits_of(llm, prompt, decoded), expected, 90 + DECODED)
        assert_read_from_flash(llm, moe=form in MOE_FORMS)


@pytest.mark.sanitize
@pytest.mark.parametrize("form", ["arcee", "llama", "qwen3moe", "deepseek2-fused"])
def test_logits_do_not_depend_on_the_budget(form: str, model_file: ModelFile) -> None:
    path, prompt, decoded = model_file(form, "Q4_0"), tokens(64, seed=3), tokens(DECODED, seed=4)
    with open_resident(path, n_ubatch=16) as resident:
        expected = logits_of(resident, prompt, decoded)
    read = []
    for share in (LEAST, 0.1, 0.3, 0.6, 1.0):
        with open_flash(path, share=share, n_ubatch=16) as llm:
            assert_same_logits(logits_of(llm, prompt, decoded), expected, 64 + DECODED)
            read.append(llm.flash.stats().total.bytes_read)
    assert read[0] > read[-1], "more memory must mean fewer reads"


def test_a_second_prompt_gives_the_same_logits_as_in_a_fresh_model(model_file: ModelFile) -> None:
    path, decoded = model_file("qwen3moe", "Q8_0"), tokens(DECODED, seed=2)
    with open_resident(path) as resident:
        expected = logits_of(resident, tokens(80, seed=8), decoded)
    with open_flash(path, share=LEAST) as llm:
        logits_of(llm, tokens(300, seed=7), decoded)
        assert_same_logits(logits_of(llm, tokens(80, seed=8), decoded), expected, 80 + DECODED)


def test_wrong_expert_changes_the_answer(model_file: ModelFile, tmp_path: Path) -> None:
    """Shows that the tests above can fail: one expert's slice of one matrix is replaced by another's on purpose."""
    path, prompt, decoded = model_file("qwen3moe", "Q8_0"), tokens(80, seed=1), tokens(DECODED, seed=2)
    used = trace_routing(path, prompt)[:, 1].ravel()
    expert = int(np.bincount(used).argmax())
    wrong = tmp_path / "wrong.gguf"
    shutil.copy(path, wrong)
    with wrong.open("r+b") as file:
        tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_up_exps.weight")
        size = tensor.n_bytes // 16
        other = (expert + 1) % 16
        file.seek(int(tensor.data_offset) + other * size)
        data = file.read(size)
        file.seek(int(tensor.data_offset) + expert * size)
        assert file.read(size) != data
        file.seek(-size, 1)
        file.write(data)
    with open_resident(path) as resident:
        expected = logits_of(resident, prompt, decoded)
    with open_flash(wrong) as llm:
        actual = logits_of(llm, prompt, decoded)
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    with pytest.raises(AssertionError, match=r"logits of .* tokens differ"):
        assert_same_logits(actual, expected, 80 + DECODED)
    first = int(np.flatnonzero((used.reshape(80, -1) == expert).any(axis=1))[0])
    assert (actual[first] != expected[first]).any(), "the first token that uses the expert must notice"
    assert np.allclose(actual[:first], expected[:first], atol=1e-2), "tokens before it must not"
