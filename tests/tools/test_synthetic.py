"""Synthetic models: the engine loads them, nothing in them is alike, and their routing is what was asked for."""

from __future__ import annotations

import os
import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ModelFile
from engines import logits_of, open_resident, tokens
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_tools.routing import distinct_experts, lru_hit_rate, random_tokens, trace_routing
from gguf_tools.synthetic import ARCHITECTURES, MOE_FORMS, PRESETS, SKEWED, everything, forms, tiny, types_named, write
from gguf_tools.synthetic.__main__ import main

QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4", "Q4_K_M")


@pytest.mark.parametrize("form", ARCHITECTURES)
def test_every_form_gives_sound_logits(form: str, model_file: ModelFile) -> None:
    with open_resident(model_file(form)) as llm:
        logits = logits_of(llm, tokens(64), tokens(8, seed=1))
    assert np.isfinite(logits).all()
    assert 1 < logits.std() < 10
    assert len(np.unique(logits.argmax(axis=1))) > 10


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_every_type_gives_sound_logits(quantisation: str, tmp_path: Path) -> None:
    model = tiny("qwen3moe", n_layer=2)
    types = types_named(quantisation) if quantisation.endswith("_M") else everything(quantisation)
    (path,) = write(replace(model, types=types), tmp_path / "model.gguf")
    with open_resident(path) as llm:
        logits = logits_of(llm, tokens(64), [])
    assert np.isfinite(logits).all() and logits.std() > 0.5


@pytest.mark.parametrize("form", ARCHITECTURES)
def test_all_experts_layers_and_tensors_differ(form: str, model_file: ModelFile) -> None:
    contents = []
    for tensor in GGUFReader(model_file(form)).tensors:
        data = np.ascontiguousarray(tensor.data)
        parts = data if "_exps.weight" in tensor.name else data[None]
        contents += [part.tobytes() for part in parts]
    assert len(set(contents)) == len(contents)
    if form in MOE_FORMS:
        assert len(contents) > 2 * 16


def test_output_is_not_tied_to_the_embedding(model_file: ModelFile) -> None:
    names = {tensor.name for tensor in GGUFReader(model_file("llama")).tensors}
    assert {"output.weight", "token_embd.weight"} <= names


def test_the_same_seed_gives_the_same_file_and_another_one_another(tmp_path: Path) -> None:
    contents = [
        write(tiny("mixtral", seed=seed), tmp_path / f"{i}.gguf")[0].read_bytes() for i, seed in enumerate((5, 5, 6))
    ]
    assert contents[0] == contents[1] != contents[2]


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    model = tiny("qwen2moe")
    (whole,) = write(model, tmp_path / "whole.gguf")
    shards = write(model, tmp_path / "split.gguf", n_shards=3)
    assert [shard.name for shard in shards] == [f"split-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    expected = {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(whole).tensors}
    actual = {tensor.name: tensor.data.tobytes() for shard in shards for tensor in GGUFReader(shard).tensors}
    assert actual == expected
    with open_resident(whole) as one, open_resident(shards[0]) as several:
        assert np.array_equal(logits_of(one, tokens(64), []), logits_of(several, tokens(64), []))


def test_any_text_is_tokenised_and_comes_back(model_file: ModelFile) -> None:
    with open_resident(model_file("llama"), vocab_only=True, logits_all=False) as llm:

        @settings(max_examples=50, deadline=None)
        @given(st.text())
        def comes_back(text: str) -> None:
            encoded = text.encode()
            assert llm.detokenize(llm.tokenize(encoded, add_bos=False)) == encoded

        comes_back()


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(OSError, match="GB free"):
        write(tiny("llama"), tmp_path / "model.gguf")
    assert not os.listdir(tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tiny("llama"), tmp_path / "model.gguf", progress=interrupt)
    assert not os.listdir(tmp_path)


def test_progress_adds_up_to_the_size(tmp_path: Path) -> None:
    model = tiny("gpt-oss", "MXFP4")
    done: list[int] = []
    write(model, tmp_path / "model.gguf", progress=done.append)
    assert sum(done) == model.n_bytes


def test_the_large_presets_have_the_sizes_that_are_stated() -> None:
    moe = PRESETS["qwen3-30b-a3b-12l"]
    assert 4.1e9 < moe.n_bytes < 4.4e9
    experts = [t for t in forms.tensors(moe.shape) if "_exps" in t.name]
    per_token = sum(moe.tensor_bytes(t) for t in experts) * moe.shape.n_expert_used / moe.shape.n_expert
    assert 250e6 < per_token < 260e6
    assert 3.8e9 < PRESETS["llama2-7b-18l"].n_bytes < 4.3e9
    assert 17e9 < PRESETS["qwen3-30b-a3b"].n_bytes < 19e9
    assert 60e9 < PRESETS["gpt-oss-120b"].n_bytes < 65e9


@pytest.mark.parametrize("preset", ["qwen3-30b-a3b", "gpt-oss-120b"])
def test_the_recipe_of_a_whole_model_makes_a_small_one(preset: str, tmp_path: Path) -> None:
    """Form, heads, experts and types as they are; narrow, and of two layers."""
    model = PRESETS[preset]
    shape = replace(model.shape, n_layer=2, n_embd=256, n_ff=256, n_ff_exp=256, n_vocab=512)
    (path,) = write(replace(model, shape=shape, popularity=SKEWED), tmp_path / "model.gguf")
    types = {tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert types == ({"F32", "Q4_K", "Q6_K"} if preset == "qwen3-30b-a3b" else {"F32", "MXFP4", "Q8_0"})
    with open_resident(path) as llm:
        logits = logits_of(llm, tokens(64), tokens(8, seed=1))
    assert np.isfinite(logits).all() and logits.std() > 0.5
    trace = trace_routing(path, random_tokens(100, shape.n_vocab))
    assert trace.shape == (100, 2, shape.n_expert_used)
    uses = np.bincount(trace[:, 1].ravel(), minlength=shape.n_expert)
    assert np.sort(uses)[-shape.n_expert // 4 :].sum() > 0.5 * uses.sum(), "a quarter of the experts has most uses"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.gguf"
    arguments = ["--preset", "tiny-qwen3moe", "--types", "Q4_0", "--routing", "skewed", "--layers", "2", str(out)]
    assert main(arguments) == 0
    assert out.name in capsys.readouterr().out
    with open_resident(out) as llm:
        assert np.isfinite(logits_of(llm, tokens(64), [])).all()


def test_skewed_routing_is_easier_to_cache_than_uniform(tmp_path: Path) -> None:
    hits, distinct = {}, {}
    shape = replace(tiny("qwen3moe").shape, n_expert=64, n_embd=512)
    for popularity in (0.0, 0.8, 2.0):
        model = replace(tiny("qwen3moe", "Q4_0"), shape=shape, popularity=popularity)
        (path,) = write(model, tmp_path / "model.gguf")
        trace = trace_routing(path, random_tokens(300, shape.n_vocab))
        assert trace.shape == (300, 3, 4)
        hits[popularity] = lru_hit_rate(trace, 3 * 64 // 2, warm_up=100)
        distinct[popularity] = distinct_experts(trace)
    assert 0.4 < hits[0.0] < 0.65, "uniform: about the share that is cached"
    assert hits[0.0] < hits[0.8] < hits[2.0]
    assert distinct[0.0] > distinct[0.8] > distinct[2.0]


def test_traced_experts_are_those_that_matter(model_file: ModelFile) -> None:
    trace = trace_routing(model_file("mixtral"), tokens(100))
    assert trace.shape == (100, 3, 2)
    assert trace.min() >= 0 and trace.max() < 8
    assert (trace[..., 0] != trace[..., 1]).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=30), st.integers(1, 12))
def test_lru_hit_rate_matches_a_simple_model(uses: list[list[int]], n_cached: int) -> None:
    trace = np.array(uses, np.int32)[:, None, :]
    recent: deque[int] = deque()
    hits = 0
    for expert in np.array(uses).ravel():
        hits += int(expert) in recent
        recent = deque((e for e in recent if e != expert), maxlen=n_cached)
        recent.append(int(expert))
    assert lru_hit_rate(trace, n_cached) == pytest.approx(hits / trace.size)
