"""Tiny Hugging Face checkpoints with random weights: folders as transformers writes them, made without it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

LAYERS, EMBD, FF, HEADS, HEADS_KV, VOCAB, CTX = 2, 64, 96, 4, 2, 320, 48
HEAD_DIM = EMBD // HEADS
NUMPY = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class Checkpoint:
    config: dict[str, Any]
    weights: dict[str, Floats]  # by transformers' names, the row length last
    tokenizer: str  # bytes (GPT-2's kind) or sentencepiece

    def but(self, **config: Any) -> Checkpoint:
        """With other values in config.json; None removes one."""
        merged = self.config | config
        return replace(self, config={key: value for key, value in merged.items() if value is not None})

    def write(self, folder: Path, *, dtype: str = "F32", shards: int = 1) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", self.config)
        write_weights(folder, self.weights, dtype=dtype, shards=shards)
        (write_byte_tokenizer if self.tokenizer == "bytes" else write_sentencepiece)(folder)
        return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def stored(values: Floats, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(NUMPY[dtype]).tobytes()


def loaded(values: Floats, dtype: str) -> Floats:
    """What is left of the values when they have been stored."""
    if dtype == "BF16":
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return values.astype(NUMPY[dtype]).astype(np.float32)


def write_safetensors(path: Path, weights: Mapping[str, Floats], dtype: str = "F32") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, values in weights.items():
        begin = len(data)
        data += stored(np.ascontiguousarray(values), dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [begin, len(data)]}
    write_raw_safetensors(path, json.dumps(header).encode(), bytes(data))


def write_raw_safetensors(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write_weights(folder: Path, weights: Mapping[str, Floats], *, dtype: str = "F32", shards: int = 1) -> None:
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[i::shards])
        write_safetensors(folder / file, part, dtype)
        where |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


# -- tokenizers

BYTES = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]  # the 68 bytes that are not printable, from 0 on
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u0120", "hello")]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's order


def byte_vocabulary() -> dict[str, int]:
    tokens = [*SPECIALS, *BYTES, *("".join(pair) for pair in MERGES)]
    return {token: i for i, token in enumerate(tokens)}


def write_byte_tokenizer(folder: Path) -> None:
    """As facebook/opt-125m has it: vocab.json, merges.txt, no tokenizer.json."""
    write_json(folder / "vocab.json", byte_vocabulary())
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES)]) + "\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}
    write_json(folder / "tokenizer_config.json", settings)


def fast_byte_tokenizer(pre_tokenizer: Any = None) -> dict[str, Any]:
    """What tokenizer.json holds for the same tokenizer."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": SPECIALS[i], **usual} for i in (1, 2)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer or byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": byte_vocabulary(), "merges": [list(pair) for pair in MERGES]},
    }


SPACE = "\u2581"
WORDS = ["he", "ll", "hell", "hello", f"{SPACE}hello"]  # in the order in which they are merged
LETTERS = [SPACE, "h", "e", "l", "o"]


def pieces() -> list[tuple[str, float, int]]:
    """Text, score and type of a SentencePiece model's pieces, as Llama's are laid out."""
    found: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    found += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    found += [(word, -float(rank), 1) for rank, word in enumerate([*WORDS, *LETTERS])]
    return [*found, ("<AI>", 0.0, 4)]


def write_sentencepiece(folder: Path, *, model_type: int = 2, add_dummy_prefix: bool = True) -> None:
    data = b""
    for text, score, kind in pieces():
        text_field = b"\x0a" + _varint(len(text.encode())) + text.encode()
        piece = text_field + b"\x15" + struct.pack("<f", score) + (b"\x18" + _varint(kind) if kind != 1 else b"")
        data += b"\x0a" + _varint(len(piece)) + piece
    byte_fallback = b"\x98\x02\x01"
    trainer, normalizer = b"\x18" + _varint(model_type) + byte_fallback, b"\x18" + _varint(int(add_dummy_prefix))
    data += b"\x12" + _varint(len(trainer)) + trainer + b"\x1a" + _varint(len(normalizer)) + normalizer
    (folder / "tokenizer.model").write_bytes(data)
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# -- architectures


class _Random:
    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.weights: dict[str, Floats] = {}

    def normal(self, name: str, *shape: int, sigma: float = 1.0, mean: float = 0.0) -> None:
        self.weights[name] = np.asarray(mean + sigma * self._rng.standard_normal(shape), np.float32)

    def matrix(self, name: str, rows: int, columns: int, *, bias: bool = False) -> None:
        self.normal(f"{name}.weight", rows, columns, sigma=columns**-0.5)
        if bias:
            self.normal(f"{name}.bias", rows, sigma=0.2)

    def norm(self, name: str, *, bias: bool = False, mean: float = 1.0) -> None:
        self.normal(f"{name}.weight", EMBD, sigma=0.1, mean=mean)
        if bias:
            self.normal(f"{name}.bias", EMBD, sigma=0.2)


def opt(*, norm_before: bool = True, n_word: int = EMBD, tied: bool = True, prefix: str = "model.") -> Checkpoint:
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "hidden_size": EMBD,
        "word_embed_proj_dim": n_word,
        "ffn_dim": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CTX,
        "vocab_size": VOCAB,
        "do_layer_norm_before": norm_before,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "tie_word_embeddings": tied,
    }
    random, decoder = _Random(1), f"{prefix}decoder."
    random.normal(f"{decoder}embed_tokens.weight", VOCAB, n_word)
    random.normal(f"{decoder}embed_positions.weight", CTX + 2, EMBD, sigma=0.5)
    if n_word != EMBD:
        random.matrix(f"{decoder}project_in", EMBD, n_word)
        random.matrix(f"{decoder}project_out", n_word, EMBD)
    for il in range(LAYERS):
        layer = f"{decoder}layers.{il}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            random.matrix(f"{layer}self_attn.{name}", EMBD, EMBD, bias=True)
        random.norm(f"{layer}self_attn_layer_norm", bias=True)
        random.matrix(f"{layer}fc1", FF, EMBD, bias=True)
        random.matrix(f"{layer}fc2", EMBD, FF, bias=True)
        random.norm(f"{layer}final_layer_norm", bias=True)
    if norm_before:
        random.norm(f"{decoder}final_layer_norm", bias=True)
    # a tied one may be stored all the same
    random.weights["lm_head.weight"] = random.weights[f"{decoder}embed_tokens.weight"]
    if not tied:
        random.normal("lm_head.weight", VOCAB, n_word, sigma=n_word**-0.5)
    return Checkpoint(config, random.weights, "bytes")


def llama(model_type: str = "llama", hidden_act: str = "relu", **config: Any) -> Checkpoint:
    """Also mistral, sparsellama, bamboo, minicpm, arcee and nemotron."""
    nemotron, gated = model_type == "nemotron", model_type not in ("arcee", "nemotron")
    merged = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": model_type,
        "hidden_act": hidden_act,
        "hidden_size": EMBD,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS_KV,
        "max_position_embeddings": CTX,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
        **config,
    }
    if nemotron:
        del merged["rms_norm_eps"]
        merged |= {"norm_eps": 1e-5, "partial_rotary_factor": 0.5}
    if model_type == "minicpm":
        merged |= {"scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 16}
    bias, head_dim = bool(merged.get("attention_bias")), int(merged.get("head_dim", HEAD_DIM))
    random, mean = _Random(2), 0.0 if nemotron else 1.0
    random.normal("model.embed_tokens.weight", VOCAB, EMBD)
    for il in range(LAYERS):
        layer = f"model.layers.{il}."
        random.matrix(f"{layer}self_attn.q_proj", HEADS * head_dim, EMBD, bias=bias)
        random.matrix(f"{layer}self_attn.k_proj", HEADS_KV * head_dim, EMBD, bias=bias)
        random.matrix(f"{layer}self_attn.v_proj", HEADS_KV * head_dim, EMBD, bias=bias)
        random.matrix(f"{layer}self_attn.o_proj", EMBD, HEADS * head_dim, bias=bias)
        for name in ("gate_proj", "up_proj") if gated else ("up_proj",):
            random.matrix(f"{layer}mlp.{name}", FF, EMBD)
        random.matrix(f"{layer}mlp.down_proj", EMBD, FF)
        random.norm(f"{layer}input_layernorm", bias=nemotron, mean=mean)
        random.norm(f"{layer}post_attention_layernorm", bias=nemotron, mean=mean)
        random.normal(f"{layer}self_attn.rotary_emb.inv_freq", HEAD_DIM // 2)  # old checkpoints have it
    random.norm("model.norm", bias=nemotron, mean=mean)
    if not merged["tie_word_embeddings"]:
        random.normal("lm_head.weight", VOCAB, EMBD, sigma=EMBD**-0.5)
    return Checkpoint(merged, random.weights, "sentencepiece")


def falcon(*, new: bool = False, activation: str = "relu") -> Checkpoint:
    """new: as Falcon-40B, several heads of k and v and two norms; otherwise as Falcon-7B."""
    config = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "activation": activation,
        "hidden_size": EMBD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_kv_heads": HEADS_KV if new else HEADS,  # not looked at by a multi-query one
        "multi_query": True,
        "new_decoder_architecture": new,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
    }
    random, n_kv = _Random(3), HEADS_KV if new else 1
    random.normal("transformer.word_embeddings.weight", VOCAB, EMBD)
    for il in range(LAYERS):
        layer = f"transformer.h.{il}."
        for name in ("ln_attn", "ln_mlp") if new else ("input_layernorm",):
            random.norm(f"{layer}{name}", bias=True)
        random.matrix(f"{layer}self_attention.query_key_value", (HEADS + 2 * n_kv) * HEAD_DIM, EMBD)
        random.matrix(f"{layer}self_attention.dense", EMBD, EMBD)
        random.matrix(f"{layer}mlp.dense_h_to_4h", 4 * EMBD, EMBD)
        random.matrix(f"{layer}mlp.dense_4h_to_h", EMBD, 4 * EMBD)
    random.norm("transformer.ln_f", bias=True)
    return Checkpoint(config, random.weights, "bytes")


_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}

CHECKPOINTS: dict[str, Callable[[], Checkpoint]] = {
    "opt": opt,
    "opt-350m": lambda: opt(norm_before=False, n_word=32),
    "opt-old": lambda: opt(prefix="", tied=False),
    "relu-llama": llama,
    "relu2-llama": lambda: llama(hidden_act="relu2", attention_bias=True, head_dim=32),
    "llama3": lambda: llama(rope_scaling=_LLAMA3 | {"original_max_position_embeddings": 24}),
    "linear-llama": lambda: llama(rope_scaling={"type": "linear", "factor": 2.0}, tie_word_embeddings=True),
    "yarn-llama": lambda: llama(
        rope_theta=100.0, rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24}
    ),
    "mistral": lambda: llama("mistral", sliding_window=4096),
    "prosparse": lambda: llama("sparsellama", "fatrelu", hidden_act_param=0.3),
    "bamboo": lambda: llama("bamboo"),
    "minicpm": lambda: llama("minicpm", "fatrelu", hidden_act_param=0.3, tie_word_embeddings=True),
    "minicpm-llama-format": lambda: llama("llama", "fatrelu", hidden_act_param=0.3),
    "falcon-7b": falcon,
    "falcon-40b": lambda: falcon(new=True),
    "arcee": lambda: llama("arcee", "relu2"),
    "nemotron": lambda: llama("nemotron", "relu2"),
}
