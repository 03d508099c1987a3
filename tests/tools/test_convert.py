"""Hugging Face checkpoints become GGUF files: the right tensors under the right keys, tokenised alike, computed alike,
and anything that would come out wrong is refused by its name."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_forward import logits
from checkpoints import (
    CHECKPOINTS,
    CTX,
    EMBD,
    FF,
    HEAD_DIM,
    HEADS,
    HEADS_KV,
    LAYERS,
    VOCAB,
    Checkpoint,
    Floats,
    falcon,
    fast_byte_tokenizer,
    llama,
    loaded,
    opt,
    pieces,
    write_json,
    write_raw_safetensors,
    write_safetensors,
    write_sentencepiece,
)
from engines import Model, logits_of, open_resident, tokens
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_tools import FLASH, GgufToolsError
from gguf_tools.bundle import bundle
from gguf_tools.cli import main
from gguf_tools.convert import FILE_TYPES, convert
from gguf_tools.huggingface import HuggingFaceSource, open_huggingface
from gguf_tools.huggingface.safetensors import read_safetensors
from gguf_tools.source import open_gguf, row_count
from gguf_tools.verify import verify

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
FUZZ = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(checkpoint, dtype="F32", shards=1): a folder that holds it."""

    def write(checkpoint: Checkpoint, **options: Any) -> Path:
        return checkpoint.write(tmp_path / "checkpoint", **options)

    return write


Folder = Callable[..., Path]


def array(source: Any, name: str) -> Floats:
    """In numpy's order of dimensions."""
    tensor = source.tensors[name]
    return np.asarray(tensor.floats(0, row_count(tensor)).reshape(tensor.shape[::-1]))


# -- tensors


def in_pairs(rows: Floats, n_head: int) -> Floats:
    """Element i of a head and element i + half of it, one after the other; said otherwise than the code says it."""
    half = len(rows) // n_head // 2
    return rows[[2 * half * head + i + j for head in range(n_head) for i in range(half) for j in (0, half)]]


def expected_opt(weights: dict[str, Floats]) -> dict[str, Floats]:
    decoder = "model.decoder." if "model.decoder.embed_tokens.weight" in weights else "decoder."
    names = {"token_embd": "embed_tokens", "position_embd": "embed_positions", "output_norm": "final_layer_norm"}
    names |= {"project_in": "project_in", "project_out": "project_out"}
    for il in range(LAYERS):
        layer = {
            "attn_norm": "self_attn_layer_norm",
            "ffn_norm": "final_layer_norm",
            "ffn_up": "fc1",
            "ffn_down": "fc2",
        }
        layer |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"} | {"attn_output": "self_attn.out_proj"}
        names |= {f"blk.{il}.{ours}": f"layers.{il}.{theirs}" for ours, theirs in layer.items()}
    return by_names(weights, {ours: decoder + theirs for ours, theirs in names.items()})


def expected_llama(weights: dict[str, Floats], *, pairs: bool = True, plus: float = 0.0) -> dict[str, Floats]:
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for il in range(LAYERS):
        layer = {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_output": "self_attn.o_proj",
        }
        layer |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
        layer |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
        names |= {f"blk.{il}.{ours}": f"model.layers.{il}.{theirs}" for ours, theirs in layer.items()}
    found = by_names(weights, names)
    for name in found:
        if pairs and ("attn_q." in name or "attn_k." in name):
            found[name] = in_pairs(found[name], HEADS if "attn_q." in name else HEADS_KV)
        if name.endswith("norm.weight"):
            found[name] = found[name] + np.float32(plus)
    return found


def expected_falcon(weights: dict[str, Floats], *, n_kv: int) -> dict[str, Floats]:
    names = {"token_embd": "word_embeddings", "output_norm": "ln_f"}
    for il in range(LAYERS):
        layer = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"} if n_kv > 1 else {"attn_norm": "input_layernorm"}
        layer |= {"attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"}
        layer |= {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}
        names |= {f"blk.{il}.{ours}": f"h.{il}.{theirs}" for ours, theirs in layer.items()}
    found = by_names(weights, {ours: f"transformer.{theirs}" for ours, theirs in names.items()})
    for il in range(LAYERS):
        heads = np.split(found[f"blk.{il}.attn_qkv.weight"], HEADS + 2 * n_kv)
        per_group = HEADS // n_kv + 2
        groups = [heads[i : i + per_group] for i in range(0, len(heads), per_group)]
        q = [head for group in groups for head in group[:-2]]
        parts = [*q, *(group[-2] for group in groups), *(group[-1] for group in groups)]
        found[f"blk.{il}.attn_qkv.weight"] = np.concatenate(parts)
    return found


def by_names(weights: dict[str, Floats], names: dict[str, str]) -> dict[str, Floats]:
    return {
        f"{ours}.{kind}": weights[f"{theirs}.{kind}"]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in weights
    }


def expected_tensors(name: str, checkpoint: Checkpoint) -> dict[str, Floats]:
    weights = {
        name: values
        for name, values in checkpoint.weights.items()
        if name != "lm_head.weight" or not checkpoint.config["tie_word_embeddings"]
    }
    if name.startswith("opt"):
        return expected_opt(weights) | by_names(weights, {"output": "lm_head"})
    if name.startswith("falcon"):
        return expected_falcon(weights, n_kv=HEADS_KV if name == "falcon-40b" else 1)
    return expected_llama(weights, pairs=name != "nemotron", plus=1.0 if name == "nemotron" else 0.0)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_tensor_is_the_checkpoints_under_llama_cpps_name(name: str, folder: Folder) -> None:
    checkpoint = CHECKPOINTS[name]()
    source = open_huggingface(folder(checkpoint))
    expected = expected_tensors(name, checkpoint)
    assert set(source.tensors) - {"rope_freqs.weight"} == set(expected)
    assert ("rope_freqs.weight" in source.tensors) == (name == "llama3")
    for tensor, values in expected.items():
        assert source.tensors[tensor].shape == values.shape[::-1], tensor
        assert np.array_equal(array(source, tensor), values), tensor


@pytest.mark.parametrize("name", ("opt", "relu-llama", "falcon-40b"))
def test_rows_are_the_same_in_whatever_runs_they_are_read(name: str, folder: Folder) -> None:
    source = open_huggingface(folder(CHECKPOINTS[name](), dtype="BF16", shards=3))
    for tensor in source.tensors.values():
        n_rows = row_count(tensor)
        whole = tensor.raw(0, n_rows)
        for start, stop in ((0, 1), (n_rows // 3, n_rows // 2 + 1), (n_rows - 1, n_rows), (n_rows, n_rows)):
            assert np.array_equal(tensor.raw(start, stop), whole[start:stop]), tensor.name
            assert np.array_equal(tensor.floats(start, stop), tensor.floats(0, n_rows)[start:stop])


@pytest.mark.parametrize("dtype", ("F32", "F16", "BF16"))
def test_shards_hold_the_same_model_as_one_file_in_every_type(dtype: str, tmp_path: Path) -> None:
    checkpoint = opt()
    one = open_huggingface(checkpoint.write(tmp_path / "one", dtype=dtype))
    several = open_huggingface(checkpoint.write(tmp_path / "several", dtype=dtype, shards=4))
    assert not (tmp_path / "several" / "model.safetensors").exists()
    assert list(one.tensors) == list(several.tensors)
    for name in one.tensors:
        assert one.tensors[name].kind == GGMLQuantizationType[dtype]
        assert np.array_equal(array(one, name), array(several, name))
    expected = loaded(checkpoint.weights["model.decoder.layers.0.fc1.weight"], dtype)
    assert np.array_equal(array(one, "blk.0.ffn_up.weight"), expected)


# -- key-values


def values_of(source: HuggingFaceSource) -> dict[str, Any]:
    return {key: value.value for key, value in source.values.items()}


def assert_values(source: HuggingFaceSource, **expected: Any) -> None:
    """Keys below the architecture's name, __ for the dot."""
    values = values_of(source)
    arch = values["general.architecture"]
    for key, value in expected.items():
        found = values.get(f"{arch}.{key.replace('__', '.')}")
        assert found == (pytest.approx(value) if isinstance(value, float) else value), key


def test_the_keys_of_opt(folder: Folder) -> None:
    source = open_huggingface(folder(opt()))
    assert values_of(source)["general.architecture"] == "opt"
    assert_values(
        source,
        context_length=CTX,
        embedding_length=EMBD,
        block_count=LAYERS,
        feed_forward_length=FF,
        attention__head_count=HEADS,
        attention__head_count_kv=HEADS,
        attention__layer_norm_epsilon=1e-5,
        position_offset=2,
        vocab_size=VOCAB,
        feed_forward_activation="relu",
        layer_norm_after=None,
        embedding_projection_length=None,
    )


def test_opt_350m_has_its_norms_after_and_projects_its_embeddings(folder: Folder) -> None:
    source = open_huggingface(folder(opt(norm_before=False, n_word=32)))
    assert_values(source, layer_norm_after=True, embedding_projection_length=32)
    assert "output_norm.weight" not in source.tensors
    assert source.tensors["project_in.weight"].shape == (32, EMBD)
    assert source.tensors["project_out.weight"].shape == (EMBD, 32)


def test_the_keys_of_a_relu_llama(folder: Folder) -> None:
    source = open_huggingface(folder(llama()))
    assert values_of(source)["general.architecture"] == "llama"
    assert_values(
        source,
        context_length=CTX,
        embedding_length=EMBD,
        block_count=LAYERS,
        feed_forward_length=FF,
        attention__head_count=HEADS,
        attention__head_count_kv=HEADS_KV,
        attention__layer_norm_rms_epsilon=1e-5,
        attention__key_length=HEAD_DIM,
        rope__dimension_count=HEAD_DIM,
        rope__freq_base=500.0,
        rope__scaling__type=None,
        vocab_size=VOCAB,
        feed_forward_activation="reglu",
        feed_forward_activation_threshold=None,
    )


@pytest.mark.parametrize(
    ("name", "arch", "activation", "threshold"),
    (
        ("relu2-llama", "llama", "relu2", None),
        ("prosparse", "llama", "fatrelu", 0.3),
        ("minicpm-llama-format", "llama", "fatrelu", 0.3),
        ("minicpm", "minicpm", "fatrelu", 0.3),
        ("bamboo", "llama", "drelu", None),
        ("mistral", "llama", "reglu", None),
        ("falcon-7b", "falcon", "relu", None),
        ("falcon-40b", "falcon", "relu", None),
        ("arcee", "arcee", "relu2", None),
        ("nemotron", "nemotron", "relu2", None),
    ),
)
def test_the_activation_travels_with_its_threshold(
    name: str, arch: str, activation: str, threshold: float | None, folder: Folder
) -> None:
    source = open_huggingface(folder(CHECKPOINTS[name]()))
    assert values_of(source)["general.architecture"] == arch
    assert_values(source, feed_forward_activation=activation, feed_forward_activation_threshold=threshold)


def test_minicpms_scales_are_upstreams(folder: Folder) -> None:
    source = open_huggingface(folder(CHECKPOINTS["minicpm"]()))
    assert_values(source, embedding_scale=3.0, residual_scale=1.4 / LAYERS**0.5, logit_scale=EMBD / 16)


def test_scaled_and_partial_rotary_positions(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 32}
    source = open_huggingface(llama(rope_scaling=yarn).write(tmp_path / "yarn"))
    assert_values(
        source,
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=24,
    )
    # transformers 5 writes it all in one place
    new = llama(rope_theta=None).but(rope_parameters={"rope_theta": 700.0, "rope_type": "linear", "factor": 2.0})
    source = open_huggingface(new.write(tmp_path / "new"))
    assert_values(source, rope__freq_base=700.0, rope__scaling__type="linear", rope__scaling__factor=2.0)
    source = open_huggingface(CHECKPOINTS["nemotron"]().write(tmp_path / "nemotron"))
    assert_values(source, rope__dimension_count=HEAD_DIM // 2, attention__layer_norm_epsilon=1e-5)


def test_falcons_multi_query_models_have_one_head_of_k_and_v_whatever_they_say(tmp_path: Path) -> None:
    assert_values(open_huggingface(falcon().write(tmp_path / "7b")), attention__head_count_kv=1)
    assert_values(open_huggingface(falcon(new=True).write(tmp_path / "40b")), attention__head_count_kv=HEADS_KV)


# -- computed alike


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_engines_logits_are_those_of_transformers_arithmetic(name: str, folder: Folder, tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS[name]()
    convert(folder(checkpoint), tmp_path / "model.gguf", kind=F32, bundled=False)
    assert_computed_as(checkpoint, tmp_path / "model.gguf", flash_offload=False)


@pytest.mark.parametrize("name", ("opt", "relu-llama", "prosparse", "bamboo", "minicpm", "falcon-40b", "nemotron"))
def test_so_are_those_of_a_bundled_model_on_flash(name: str, folder: Folder, tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS[name]()
    convert(folder(checkpoint), tmp_path / "model.gguf", kind=F32)
    assert_computed_as(checkpoint, tmp_path / "model.gguf", flash_offload=True)


def assert_computed_as(checkpoint: Checkpoint, path: Path, *, flash_offload: bool) -> None:
    sequence = tokens(40, VOCAB)
    options = {"n_ctx": CTX, "n_threads": 1, "type_k": 0, "type_v": 0, "logits_all": True, "verbose": False}
    with Model(str(path), flash_offload=flash_offload, **options) as llm:
        actual = logits_of(llm, sequence[:30], sequence[30:])
    expected = logits(checkpoint, sequence)
    assert np.abs(actual - expected).max() < 1e-4 * expected.std()


def test_a_dense_llama_is_computed_right_without_bundles(folder: Folder, tmp_path: Path) -> None:
    checkpoint = llama(hidden_act="silu")
    convert(folder(checkpoint), tmp_path / "model.gguf", kind=F32, bundled=False)
    assert "llama.feed_forward_activation" not in open_gguf(tmp_path / "model.gguf").values
    assert_computed_as(checkpoint, tmp_path / "model.gguf", flash_offload=False)


def test_the_engine_tokenises_as_opts_tokenizer_does(folder: Folder, tmp_path: Path) -> None:
    source = convert(folder(opt()), tmp_path / "model.gguf", bundled=False).source
    ids = {token: i for i, token in enumerate(values_of(source)["tokenizer.ggml.tokens"])}
    space, newline = "\u0120", "\u010a"
    with open_resident(tmp_path / "model.gguf", vocab_only=True, logits_all=False) as llm:
        assert llm.tokenize(b"hello hello ell\n") == [
            ids["</s>"], ids["hello"], ids[f"{space}hello"], ids[space], ids["e"], ids["ll"], ids[newline]
        ]  # fmt: skip
        assert llm.detokenize([ids["hello"], ids[f"{space}hello"]]) == b"hello hello"
        assert llm.token_bos() == llm.token_eos() == 2


@pytest.mark.parametrize("fast", (False, True))
def test_the_engine_tokenises_as_sentencepiece_does(fast: bool, folder: Folder, tmp_path: Path) -> None:
    path = folder(llama())
    if fast:
        (path / "tokenizer.model").unlink()
        write_json(path / "tokenizer.json", fast_sentencepiece())
    convert(path, tmp_path / "model.gguf", bundled=False)
    ids = {text: i for i, (text, _, _) in enumerate(pieces())}
    space = "\u2581"
    with open_resident(tmp_path / "model.gguf", vocab_only=True, logits_all=False) as llm:
        assert llm.tokenize(b"hello hell \xe2\x98\x83<AI>") == [
            ids["<s>"], ids[f"{space}hello"], ids[space], ids["hell"], ids[space],
            ids["<0xE2>"], ids["<0x98>"], ids["<0x83>"], ids["<AI>"],
        ]  # fmt: skip


def fast_sentencepiece() -> dict[str, Any]:
    """What transformers makes of that tokenizer.model."""
    vocabulary = {text: i for i, (text, _, _) in enumerate(pieces())}
    added = [{"id": i, "content": text, "special": True} for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    merges = ["h e", "l l", "he ll", "hell o", "\u2581 hello", "\u2581h ello", "\u2581he llo"]
    return {
        "added_tokens": [*added, {"id": vocabulary["<AI>"], "content": "<AI>", "special": False}],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"},
    }


# -- tokenizers


def test_opts_padded_vocabulary(folder: Folder) -> None:
    values = values_of(open_huggingface(folder(opt())))
    listed, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(listed) == len(types) == VOCAB
    assert listed[-1] == f"[PAD{VOCAB - 1}]" and types[-1] == 5, "unused"
    assert [types[listed.index(token)] for token in ("</s>", "<pad>", "hello")] == [3, 3, 1]
    assert values["tokenizer.ggml.model"] == "gpt2" and values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.merges"][:2] == ["h e", "l l"]
    assert values["tokenizer.ggml.bos_token_id"] == values["tokenizer.ggml.eos_token_id"] == 2
    assert values["tokenizer.ggml.padding_token_id"] == 1
    assert values["tokenizer.ggml.add_bos_token"] is True


def test_one_tokenizer_in_one_file_or_two(folder: Folder) -> None:
    path = folder(opt())
    two = values_of(open_huggingface(path))
    write_json(path / "tokenizer.json", fast_byte_tokenizer())
    (path / "vocab.json").unlink()
    (path / "merges.txt").unlink()
    assert values_of(open_huggingface(path)) == two


def test_a_byte_level_tokenizer_that_does_not_say_so_adds_no_bos(folder: Folder) -> None:
    path = folder(opt())
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    assert values_of(open_huggingface(path))["tokenizer.ggml.add_bos_token"] is False


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence_of(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = BYTE_LEVEL | {"use_regex": False}
FALCON = sequence_of(
    {"type": "Punctuation", "behavior": "Contiguous"},
    BYTE_LEVEL,
    {"type": "Digits", "individual_digits": False},
    split("[0-9][0-9][0-9]"),
)


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    (
        (BYTE_LEVEL, False, "gpt-2"),
        (FALCON, False, "falcon"),
        (sequence_of(split(LLAMA3), BYTES_ONLY), True, "llama-bpe"),
        (sequence_of(split(LLAMA3), BYTES_ONLY), False, "smaug-bpe"),
        (sequence_of(split(LLAMA3.replace("{1,3}", "")), BYTES_ONLY), False, "qwen2"),
        (sequence_of({"type": "Digits", "individual_digits": True}, BYTE_LEVEL), False, "starcoder"),
    ),
)
def test_pre_tokenizers_by_what_they_do(
    pre_tokenizer: dict[str, Any], ignore_merges: bool, name: str, folder: Folder
) -> None:
    path = folder(falcon())
    tokenizer = fast_byte_tokenizer(pre_tokenizer)
    tokenizer["model"]["ignore_merges"] = ignore_merges
    write_json(path / "tokenizer.json", tokenizer)
    assert values_of(open_huggingface(path))["tokenizer.ggml.pre"] == name


def test_sentencepiece_keeps_scores_types_and_its_space(folder: Folder) -> None:
    path = folder(llama())
    values = values_of(open_huggingface(path))
    expected = pieces()
    n = len(expected)
    assert values["tokenizer.ggml.model"] == "llama" and values["tokenizer.ggml.pre"] == "default"
    assert values["tokenizer.ggml.tokens"][:n] == [text for text, _, _ in expected]
    assert values["tokenizer.ggml.scores"][:n] == [score for _, score, _ in expected]
    assert values["tokenizer.ggml.token_type"][:n] == [kind for _, _, kind in expected]
    assert values["tokenizer.ggml.token_type"][n:] == [5] * (VOCAB - n)
    assert values["tokenizer.ggml.add_space_prefix"] is True and values["tokenizer.ggml.add_bos_token"] is True
    write_sentencepiece(path, add_dummy_prefix=False)
    assert values_of(open_huggingface(path))["tokenizer.ggml.add_space_prefix"] is False


def test_added_tokens_and_chat_templates_are_copied(folder: Folder) -> None:
    path = folder(llama())
    n = len(pieces())
    added = {
        str(n): {"content": "<|im_start|>", "special": False},
        str(n + 1): {"content": "a\u2581word", "special": False},
        str(VOCAB): {"content": "beyond the embeddings", "special": True},
    }
    write_json(path / "tokenizer_config.json", {"added_tokens_decoder": added, "chat_template": "{{ messages }}"})
    values = values_of(open_huggingface(path))
    assert values["tokenizer.ggml.tokens"][n : n + 2] == ["<|im_start|>", "a word"]
    assert values["tokenizer.ggml.token_type"][n : n + 2] == [3, 4], "control, user defined"
    assert len(values["tokenizer.ggml.tokens"]) == VOCAB
    assert values["tokenizer.chat_template"] == "{{ messages }}"
    templates = [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]
    write_json(path / "tokenizer_config.json", {"chat_template": templates})
    values = values_of(open_huggingface(path))
    assert values["tokenizer.chat_template"] == "{{ a }}" and values["tokenizer.chat_template.tool_use"] == "{{ b }}"
    assert values["tokenizer.chat_templates"] == ["tool_use"]


# -- files


@pytest.mark.parametrize("kind", FILE_TYPES, ids=lambda kind: kind.name)
def test_each_tensor_gets_the_type_that_it_should(kind: GGMLQuantizationType, folder: Folder, tmp_path: Path) -> None:
    convert(folder(opt(), dtype="F16"), tmp_path / "bundled.gguf", kind=kind)
    convert(tmp_path / "checkpoint", tmp_path / "ordinary.gguf", kind=kind, bundled=False)
    small = {GGMLQuantizationType.Q4_0: "Q8_0", GGMLQuantizationType.Q4_K: "Q8_0"}  # 64 is no multiple of 256
    matrix = "Q5_0" if kind.name == "Q4_K" else kind.name
    for file in ("bundled.gguf", "ordinary.gguf"):
        types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / file).tensors}
        assert types["position_embd.weight"] == types["blk.0.attn_norm.weight"] == types["blk.0.ffn_up.bias"] == "F32"
        assert types["blk.1.attn_q.weight"] == matrix
        assert types["token_embd.weight"] == small.get(kind, matrix), "also the output"
    assert types["blk.0.ffn_up.weight"] == types["blk.0.ffn_down.weight"] == matrix
    assert open_gguf(tmp_path / "bundled.gguf").values["general.file_type"].value == int(FILE_TYPES[kind])
    bundles = [tensor for tensor in open_gguf(tmp_path / "bundled.gguf").tensors.values() if tensor.kind == FLASH]
    assert len(bundles) == LAYERS


@pytest.mark.parametrize("name", ("opt", "relu-llama", "falcon-7b"))
@pytest.mark.parametrize("kind", ("F32", "F16"))
def test_bundling_at_once_is_bundling_the_ordinary_file(name: str, kind: str, folder: Folder, tmp_path: Path) -> None:
    kinds = GGMLQuantizationType[kind]
    path = folder(CHECKPOINTS[name](), dtype="BF16", shards=2)
    convert(path, tmp_path / "at-once.gguf", kind=kinds)
    convert(path, tmp_path / "ordinary.gguf", kind=kinds, bundled=False)
    bundle(tmp_path / "ordinary.gguf", tmp_path / "later.gguf")
    assert (tmp_path / "at-once.gguf").read_bytes() == (tmp_path / "later.gguf").read_bytes()
    assert verify(tmp_path / "at-once.gguf", tmp_path / "ordinary.gguf").same


def test_little_of_a_checkpoint_is_held_in_memory(folder: Folder, tmp_path: Path) -> None:
    checkpoint = opt()
    n_ff = 1 << 17  # 32 MiB a matrix
    for il in range(LAYERS):
        layer = f"model.decoder.layers.{il}."
        checkpoint.weights[f"{layer}fc1.weight"] = np.zeros((n_ff, EMBD), np.float32)
        checkpoint.weights[f"{layer}fc1.bias"] = np.zeros(n_ff, np.float32)
        checkpoint.weights[f"{layer}fc2.weight"] = np.zeros((EMBD, n_ff), np.float32)
    path = folder(checkpoint.but(ffn_dim=n_ff))
    checkpoint.weights.clear()
    for bundled in (True, False):
        tracemalloc.start()
        convert(
            path, tmp_path / "model.gguf", kind=GGMLQuantizationType.Q8_0, bundled=bundled, memory=8 << 20, force=True
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (path / "model.safetensors").stat().st_size > 4 * 32 << 20
        assert peak < 48 << 20, f"{peak >> 20} MiB"


def test_a_failed_conversion_leaves_nothing(folder: Folder, tmp_path: Path) -> None:
    checkpoint = opt()
    checkpoint.weights["model.decoder.layers.1.fc2.weight"][3, 5] = np.nan
    with pytest.raises(GgufToolsError, match=r"blk\.1\.ffn_down\.weight.*not numbers"):
        convert(folder(checkpoint), tmp_path / "model.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_value_too_large_for_the_type_is_named(folder: Folder, tmp_path: Path) -> None:
    checkpoint = llama()
    checkpoint.weights["model.layers.0.self_attn.v_proj.weight"][0, 0] = 1e6
    with pytest.raises(GgufToolsError, match=r"blk\.0\.attn_v\.weight.*too large for F16"):
        convert(folder(checkpoint), tmp_path / "model.gguf")
    convert(tmp_path / "checkpoint", tmp_path / "model.gguf", kind=GGMLQuantizationType.BF16)


def test_a_file_of_the_checkpoint_is_never_written_over(folder: Folder) -> None:
    path = folder(opt())
    before = (path / "model.safetensors").read_bytes()
    with pytest.raises(GgufToolsError, match="is the input"):
        convert(path, path / "model.safetensors", force=True)
    assert (path / "model.safetensors").read_bytes() == before


def test_command_line(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = folder(CHECKPOINTS["bamboo"]()), tmp_path / "model.gguf"

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["convert", str(path), str(out), *arguments])
        return int(ended.value.code or 0)

    assert run("--type", "q4_0") == 0
    assert "drelu" in capsys.readouterr().out
    assert run("--type", "q8_0") == 1
    assert "already there" in capsys.readouterr().err
    assert run("--type", "q8_0", "--force", "--no-bundle") == 0
    assert not any(tensor.kind == FLASH for tensor in open_gguf(out).tensors.values())
    assert run("--type", "q5_1", "--force") == 1
    assert capsys.readouterr().err.startswith("error: a checkpoint is not converted to Q5_1")
    assert run("--type", "nonsense") == 1


# -- refusals


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    (
        (opt().but(activation_function="gelu"), "activation 'gelu'.*knows relu "),
        (llama(hidden_act="gelu"), "activation 'gelu'.*knows relu, relu2, fatrelu, silu"),
        (llama("bamboo", "silu"), "activation 'silu'.*knows relu "),
        (llama("sparsellama").but(hidden_act=None), "hidden_act: is missing"),
        (llama("sparsellama", "fatrelu"), "hidden_act_param: is missing"),
        (falcon(activation="gelu_new"), "activation 'gelu_new'"),
        (llama("arcee", "silu"), "activation 'silu'.*knows relu2 "),
        (llama("minicpm", "tanh"), "activation 'tanh'"),
        (opt().but(model_type="gpt_neox"), r"model_type: is 'gpt_neox', known: opt, llama, mistral, .*nemotron"),
        (opt().but(model_type=None), "model_type: is missing"),
        (llama(num_local_experts=8), "num_local_experts.*mixtures of experts"),
        (llama(quantization_config={"quant_method": "gptq"}), "quantization_config"),
        (llama(rope_scaling={"rope_type": "longrope"}), "'longrope', known: linear, yarn, llama3"),
        (llama(rope_scaling={"type": "yarn", "factor": 2.0, "attention_factor": 3.0}), "attention_factor"),
        (llama(rope_scaling={"type": "yarn", "factor": 2.0, "beta_fast": 16}), "beta_fast: is 16"),
        (falcon().but(alibi=True), "alibi: is True"),
        (falcon().but(parallel_attn=False), "parallel_attn: is False"),
        (opt().but(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine: is False"),
        (opt().but(_remove_final_layer_norm=True), "_remove_final_layer_norm: is True"),
        (opt().but(hidden_size="768"), "hidden_size: is '768', not a whole number"),
        (opt().but(num_hidden_layers=-1), "num_hidden_layers: is -1"),
        (opt().but(ffn_dim=FF + 1), r"fc1\.weight: has the shape \[96, 64\], config.json makes it \[97, 64\]"),
        (opt().but(num_hidden_layers=LAYERS + 1), r"are missing: .*layers\.2\.self_attn_layer_norm.* and 11 more"),
        (opt().but(num_hidden_layers=LAYERS - 1), r"does not have: .*layers\.1\."),
        (opt().but(do_layer_norm_before=False), r"does not have: model\.decoder\.final_layer_norm"),
        (llama().but(tie_word_embeddings=False, attention_bias=True), r"are missing: .*q_proj\.bias"),
        (llama(num_attention_heads=3), "num_key_value_heads: is 2"),
        (llama("nemotron", "relu2", head_dim=32), "head_dim: is 32"),
    ),
)  # fmt: skip
def test_what_would_come_out_wrong_is_refused_by_its_name(
    checkpoint: Checkpoint, message: str, folder: Folder, tmp_path: Path
) -> None:
    path = folder(checkpoint)
    for bundled in (True, False):
        with pytest.raises(GgufToolsError, match=message):
            convert(path, tmp_path / "model.gguf", bundled=bundled)


@pytest.mark.parametrize("checkpoint", (llama(hidden_act="silu"), falcon(activation="gelu")))
def test_a_dense_activation_is_refused_by_its_name_unless_nothing_is_bundled(
    checkpoint: Checkpoint, folder: Folder, tmp_path: Path
) -> None:
    name = checkpoint.config.get("hidden_act") or checkpoint.config["activation"]
    with pytest.raises(GgufToolsError, match=f"activation '{name}' keeps every neuron active: nothing to bundle"):
        convert(folder(checkpoint), tmp_path / "model.gguf")
    convert(tmp_path / "checkpoint", tmp_path / "model.gguf", bundled=False)


def test_junk_is_ignored_and_listed(tmp_path: Path) -> None:
    predictor = {"model.layers.0.mlp.predictor.fc1.weight": np.zeros((4, EMBD), np.float32)}
    bamboo, other = llama("bamboo"), llama()
    bamboo.weights.update(predictor)
    other.weights.update(predictor)
    ignored = open_huggingface(bamboo.write(tmp_path / "bamboo")).ignored
    assert {*predictor, "model.layers.1.self_attn.rotary_emb.inv_freq"} <= set(ignored)
    with pytest.raises(GgufToolsError, match=r"does not have: model\.layers\.0\.mlp\.predictor"):
        open_huggingface(other.write(tmp_path / "llama"))


# -- damaged and incomplete checkpoints


def test_missing_files_are_named(folder: Folder, tmp_path: Path) -> None:
    path = folder(opt(), shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(GgufToolsError, match=r"1 of 3 files are missing: model-00002-of-00003"):
        open_huggingface(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(GgufToolsError, match=r"no weights: there is no model\.safetensors or .*pytorch_model\.bin"):
        open_huggingface(path)
    with pytest.raises(OSError, match=r"config\.json"):
        open_huggingface(tmp_path / "nowhere")


def test_an_index_that_does_not_fit_its_files_is_an_error(folder: Folder) -> None:
    path = folder(opt(), shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name = "model.decoder.layers.0.fc1.bias"
    for damaged, message in (
        ({**index["weight_map"], "made.up": "model-00001-of-00002.safetensors"}, "in none of its files: made.up"),
        ({k: v for k, v in index["weight_map"].items() if k != name}, "of which the index does not know"),
        (index["weight_map"] | {name: "../elsewhere.safetensors"}, "no weight_map"),
        ([name], "no weight_map"),
    ):
        write_json(path / "model.safetensors.index.json", {"weight_map": damaged})
        with pytest.raises(GgufToolsError, match=message):
            open_huggingface(path)


def test_pytorch_files_say_that_they_need_torch(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(opt())
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(GgufToolsError, match=r"pytorch_model\.bin: needs torch .*pip install torch"):
        open_huggingface(path)
    write_json(path / "pytorch_model.bin.index.json", {"weight_map": {"a": "pytorch_model.bin"}})
    with pytest.raises(GgufToolsError, match="needs torch"):
        open_huggingface(path)


def test_pytorch_files_hold_the_same_model(folder: Folder) -> None:
    torch = pytest.importorskip("torch")
    checkpoint = llama()
    path = folder(checkpoint, dtype="BF16")
    expected = open_huggingface(path)
    state = {name: torch.from_numpy(values).to(torch.bfloat16) for name, values in checkpoint.weights.items()}
    halves = [dict(list(state.items())[i::2]) for i in range(2)]
    (path / "model.safetensors").unlink()
    where = {}
    for i, half in enumerate(halves):
        torch.save(half, path / f"pytorch_model-{i}.bin")
        where |= dict.fromkeys(half, f"pytorch_model-{i}.bin")
    write_json(path / "pytorch_model.bin.index.json", {"weight_map": where})
    source = open_huggingface(path)
    for name in expected.tensors:
        assert np.array_equal(source.tensors[name].raw(0, 3), expected.tensors[name].raw(0, 3))
        assert np.array_equal(array(source, name), array(expected, name))


@pytest.mark.parametrize(
    ("entry", "message"),
    (
        ({"dtype": "F31"}, "w: is of the unknown type 'F31'"),
        ({"shape": [4, 5]}, r"w: is 64 bytes, but \[4, 5\] of F32 are 80"),
        ({"shape": [4, -4]}, r"w: has the shape \[4, -4\]"),
        ({"shape": [2**40, 2**40]}, "w: is 64 bytes"),
        ({"shape": "44"}, "w: has the shape '44'"),
        ({"data_offsets": [0, 128]}, "w: ends at byte 128 of the data, of which 64 are there"),
        ({"data_offsets": [64, 0]}, r"w: has the offsets \[64, 0\]"),
        ({"data_offsets": [0, 2**70]}, "w: has the offsets"),
        ({"data_offsets": [0]}, "w: has the offsets"),
    ),
)
def test_a_damaged_entry_of_a_safetensors_header_is_named(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    write_raw_safetensors(tmp_path / "x", json.dumps({"w": good | entry}).encode(), bytes(64))
    with pytest.raises(GgufToolsError, match=message):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    (
        (b"[]", 0, "not a JSON object"),
        (b"{", 0, "not JSON"),
        (b"\xff{}", 0, "not JSON"),
        (b'{"a":1,"a":2}', 0, "a name is there twice"),
        (b'{"w":1}', 0, "w: its entry in the header is not an object"),
        (b"{}", 5, "5 bytes at its end belong to no tensor"),
        (b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', 3, "w: leaves 1 bytes unused"),
        (
            b'{"v":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
            3,
            "w: overlaps another one",
        ),
    ),
)
def test_a_damaged_safetensors_header_is_an_error(header: bytes, data: int, message: str, tmp_path: Path) -> None:
    write_raw_safetensors(tmp_path / "x", header, bytes(data))
    with pytest.raises(GgufToolsError, match=message):
        read_safetensors(tmp_path / "x")
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2**60) + header)
    with pytest.raises(GgufToolsError, match="its header is not all there"):
        read_safetensors(tmp_path / "x")


def test_a_weight_of_a_type_that_weights_do_not_have_is_named(folder: Folder) -> None:
    path = folder(opt())
    data = (path / "model.safetensors").read_bytes()
    name = b'"model.decoder.layers.1.fc1.bias": {"dtype": "'
    assert data.count(name + b"F32") == 1
    (path / "model.safetensors").write_bytes(data.replace(name + b"F32", name + b"I32"))
    with pytest.raises(GgufToolsError, match=r"layers\.1\.fc1\.bias: is of type I32, not F32, F16, BF16"):
        open_huggingface(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(folder: Folder, tmp_path: Path) -> None:
    path = folder(opt())
    source = open_huggingface(path)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(9000)
    with pytest.raises(GgufToolsError, match="cut off"):
        array(source, "blk.1.ffn_up.weight")


# -- anything at all in the files: either it is read, or the error says what is wrong


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint's folder, with a tokenizer of each kind aside."""
    path = tmp_path_factory.mktemp("fuzz")
    llama().write(path / "sentencepiece")
    opt().write(path / "bytes")
    write_json(path / "bytes" / "tokenizer.json", fast_byte_tokenizer())
    yield path
    shutil.rmtree(path)


def attempt(path: Path) -> None:
    try:
        open_huggingface(path)
    except GgufToolsError as error:
        assert str(error)


@FUZZ
@given(data=st.data())
def test_a_cut_or_changed_safetensors_file_is_read_or_named(data: st.DataObject, tmp_path: Path) -> None:
    weights = {"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.float32)}
    write_safetensors(tmp_path / "x", weights)
    content = bytearray((tmp_path / "x").read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
        cut = True
    else:
        cut = False
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(content)
    try:
        found = read_safetensors(tmp_path / "x")
    except GgufToolsError as error:
        assert str(error).startswith(str(tmp_path / "x"))
        return
    assert not cut
    for weight in found.values():
        try:
            tensor = weight.tensor("t")
            tensor.raw(0, row_count(tensor))
        except GgufToolsError:
            pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def changed(value: Any, data: st.DataObject) -> Any:
    """With one thing in it replaced by any other."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or data.draw(st.integers(0, 4)) == 0:
        return data.draw(JSON)
    key = data.draw(st.sampled_from(keys))
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = changed(value[key], data)
    return copy


@pytest.mark.parametrize(
    ("kind", "file"),
    (
        ("sentencepiece", "config.json"),
        ("bytes", "config.json"),
        ("bytes", "tokenizer.json"),
        ("bytes", "tokenizer_config.json"),
        ("bytes", "special_tokens_map.json"),
        ("sentencepiece", "tokenizer_config.json"),
    ),
)
@FUZZ
@given(data=st.data())
def test_any_json_in_the_place_of_another_is_read_or_named(
    kind: str, file: str, sound: Path, data: st.DataObject
) -> None:
    path = sound / kind / file
    content = path.read_text()
    try:
        path.write_text(json.dumps(changed(json.loads(content), data)))
        attempt(sound / kind)
    finally:
        path.write_text(content)


@FUZZ
@given(data=st.data())
def test_a_damaged_sentencepiece_model_is_read_or_named(data: st.DataObject, sound: Path) -> None:
    path = sound / "sentencepiece" / "tokenizer.model"
    content = path.read_bytes()
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
        attempt(sound / "sentencepiece")
    finally:
        path.write_bytes(content)


def test_a_unigram_tokenizer_is_refused(folder: Folder) -> None:
    path = folder(llama())
    write_sentencepiece(path, model_type=1)
    with pytest.raises(GgufToolsError, match="type 1, only BPE"):
        open_huggingface(path)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer .*Whitespace.* none of gpt-2, starcoder"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "a space before the text"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer .*Lowercase"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "type WordPiece, only BPE"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "the same id, 0"),
        ({"model": {"type": "BPE", "vocab": {"a": VOCAB}, "merges": []}}, f"the id {VOCAB}, but the model has {VOCAB}"),
        ({"added_tokens": [{"id": 300, "content": "hello", "special": False}]}, "tokens 263 and 300 are both 'hello'"),
    ),
)
def test_a_tokenizer_that_the_engine_does_not_have_is_refused(
    change: dict[str, Any], message: str, folder: Folder
) -> None:
    path = folder(opt())
    write_json(path / "tokenizer.json", fast_byte_tokenizer() | change)
    with pytest.raises(GgufToolsError, match=message):
        open_huggingface(path)


def test_a_token_that_is_no_text_is_refused(folder: Folder) -> None:
    path = folder(opt())
    (path / "vocab.json").write_text('{"\\ud800": 0}')
    with pytest.raises(GgufToolsError, match=r"vocab\.json: is not JSON.*surrogates"):
        open_huggingface(path)


def test_a_checkpoint_without_a_tokenizer_is_refused(folder: Folder) -> None:
    path = folder(opt())
    (path / "merges.txt").unlink()
    with pytest.raises(GgufToolsError, match="holds no tokenizer"):
        open_huggingface(path)
