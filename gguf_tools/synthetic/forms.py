"""Shapes of the architectures: hyperparameters and the tensors that llama.cpp (src/models/) expects for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf

ARCHITECTURES = {
    "llama": "llama",
    "arcee": "arcee",
    "mixtral": "llama",
    "qwen2moe": "qwen2moe",
    "qwen3moe": "qwen3moe",
    "olmoe": "olmoe",
    "gpt-oss": "gpt-oss",
    "deepseek2": "deepseek2",
    "deepseek2-fused": "deepseek2",  # gate and up in one tensor
    "smallthinker": "smallthinker",  # experts with a ReLU
}
DENSE_FORMS = ("llama", "arcee")
MOE_FORMS = tuple(form for form in ARCHITECTURES if form not in DENSE_FORMS)


@dataclass(frozen=True)
class Shape:
    form: str
    n_layer: int
    n_embd: int
    n_ff: int  # dense FFN, shared experts
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_exp: int = 0
    n_layer_dense_lead: int = 1  # deepseek2
    n_lora: int = 64  # deepseek2: rank of q's and kv's compression
    n_rot: int = 32  # deepseek2: rotated part of a head
    n_ctx_train: int = 32768

    def __post_init__(self) -> None:
        if self.form not in ARCHITECTURES:
            raise ValueError(f"unknown form {self.form!r}, known: {', '.join(ARCHITECTURES)}")
        if self.is_moe and not (0 < self.n_expert_used <= self.n_expert and self.n_ff_exp > 0):
            raise ValueError(f"{self.form} needs n_expert >= n_expert_used > 0 and n_ff_exp > 0")
        if self.form in ("qwen2moe", "olmoe") and self.n_head * self.head_dim != self.n_embd:
            raise ValueError(f"{self.form} needs n_head * head_dim == n_embd")

    @property
    def is_moe(self) -> bool:
        return self.form in MOE_FORMS

    @property
    def arch(self) -> str:
        return ARCHITECTURES[self.form]


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # numpy order: the last dimension is the row that ggml calls ne0
    group: str  # what decides its type: embd, output, attn, ffn, ffn_down, f32
    gain: float = 1.0  # matrices: standard deviation is gain / sqrt(row); vectors (group f32, 1-D): see mean, spread
    mean: float = 0.0
    spread: float = 0.0
    layer: int = -1


def add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Hyperparameters under the keys of llama.cpp's load_arch_hparams."""
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_feed_forward_length(shape.n_ff_exp if shape.form in ("mixtral", "olmoe") else shape.n_ff)
    if shape.arch == "deepseek2":
        writer.add_head_count_kv(1)
        writer.add_rope_dimension_count(shape.n_rot)
        writer.add_q_lora_rank(shape.n_lora)
        writer.add_kv_lora_rank(shape.n_lora)
        writer.add_key_length(shape.n_lora + shape.n_rot)
        writer.add_value_length(shape.n_lora)
        writer.add_key_length_mla(shape.head_dim + shape.n_rot)
        writer.add_value_length_mla(shape.head_dim)
        writer.add_leading_dense_block_count(shape.n_layer_dense_lead)
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_scale(1.0)
        writer.add_expert_weights_norm(True)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    else:
        writer.add_head_count_kv(shape.n_head_kv)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    if shape.form == "smallthinker":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if shape.form == "gpt-oss":
        writer.add_sliding_window(128)
    if shape.is_moe:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert_used)
        if shape.form not in ("mixtral", "olmoe"):
            writer.add_expert_feed_forward_length(shape.n_ff_exp)
        if shape.form == "qwen2moe":
            writer.add_expert_shared_feed_forward_length(shape.n_ff)


def tensors(shape: Shape) -> Iterator[Tensor]:
    """All tensors, in file order."""
    # columns of an embedding row are not a fan-in: its gain makes its entries' deviation 1
    yield Tensor("token_embd.weight", (shape.n_vocab, shape.n_embd), "embd", gain=shape.n_embd**0.5)
    for il in range(shape.n_layer):
        yield from _attention(shape, il)
        if shape.is_moe and not (shape.arch == "deepseek2" and il < shape.n_layer_dense_lead):
            yield from _experts(shape, il)
        else:
            yield from _dense_ffn(shape, il, "", shape.n_ff)
    yield _norm("output_norm.weight", shape.n_embd)
    yield Tensor("output.weight", (shape.n_vocab, shape.n_embd), "output", gain=3.0)


def _norm(name: str, n: int) -> Tensor:
    return Tensor(name, (n,), "f32", mean=1.0, spread=0.1)


def _bias(name: str, *shape: int) -> Tensor:
    return Tensor(name, shape, "f32", spread=0.1)


def _attention(shape: Shape, il: int) -> Iterator[Tensor]:
    blk, d = f"blk.{il}.", shape.n_embd
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    yield _norm(blk + "attn_norm.weight", d)
    if shape.arch == "deepseek2":
        n_k = shape.head_dim + shape.n_rot
        yield Tensor(blk + "attn_q_a.weight", (shape.n_lora, d), "attn")
        yield _norm(blk + "attn_q_a_norm.weight", shape.n_lora)
        yield Tensor(blk + "attn_q_b.weight", (shape.n_head * n_k, shape.n_lora), "attn")
        yield Tensor(blk + "attn_kv_a_mqa.weight", (shape.n_lora + shape.n_rot, d), "attn")
        yield _norm(blk + "attn_kv_a_norm.weight", shape.n_lora)
        yield Tensor(blk + "attn_k_b.weight", (shape.n_head, shape.n_lora, shape.head_dim), "attn")
        yield Tensor(blk + "attn_v_b.weight", (shape.n_head, shape.head_dim, shape.n_lora), "attn")
    else:
        yield Tensor(blk + "attn_q.weight", (n_q, d), "attn")
        yield Tensor(blk + "attn_k.weight", (n_kv, d), "attn")
        yield Tensor(blk + "attn_v.weight", (n_kv, d), "attn")
    if shape.form in ("qwen2moe", "gpt-oss"):
        yield _bias(blk + "attn_q.bias", n_q)
        yield _bias(blk + "attn_k.bias", n_kv)
        yield _bias(blk + "attn_v.bias", n_kv)
    if shape.form == "qwen3moe":
        yield _norm(blk + "attn_q_norm.weight", shape.head_dim)
        yield _norm(blk + "attn_k_norm.weight", shape.head_dim)
    if shape.form == "olmoe":
        yield _norm(blk + "attn_q_norm.weight", n_q)
        yield _norm(blk + "attn_k_norm.weight", n_kv)
    yield Tensor(blk + "attn_output.weight", (d, n_q), "attn", gain=0.5)
    if shape.form == "gpt-oss":
        yield _bias(blk + "attn_output.bias", d)
        yield _bias(blk + "attn_sinks.weight", shape.n_head)
        yield _norm(blk + "post_attention_norm.weight", d)
    else:
        yield _norm(blk + "ffn_norm.weight", d)


def _dense_ffn(shape: Shape, il: int, suffix: str, n_ff: int) -> Iterator[Tensor]:
    blk = f"blk.{il}."
    if shape.form != "arcee":
        yield Tensor(f"{blk}ffn_gate{suffix}.weight", (n_ff, shape.n_embd), "ffn", layer=il)
    yield Tensor(f"{blk}ffn_down{suffix}.weight", (shape.n_embd, n_ff), "ffn_down", layer=il)
    yield Tensor(f"{blk}ffn_up{suffix}.weight", (n_ff, shape.n_embd), "ffn", layer=il)


def _experts(shape: Shape, il: int) -> Iterator[Tensor]:
    blk, n, d, n_ff = f"blk.{il}.", shape.n_expert, shape.n_embd, shape.n_ff_exp
    yield Tensor(blk + "ffn_gate_inp.weight", (n, d), "f32", layer=il)
    if shape.form == "deepseek2-fused":
        yield Tensor(blk + "ffn_gate_up_exps.weight", (n, 2 * n_ff, d), "ffn", layer=il)
    else:
        yield Tensor(blk + "ffn_gate_exps.weight", (n, n_ff, d), "ffn", layer=il)
    # the weighted mean of several experts is smaller than one expert's output
    yield Tensor(blk + "ffn_down_exps.weight", (n, d, n_ff), "ffn_down", gain=2.0, layer=il)
    if shape.form != "deepseek2-fused":
        yield Tensor(blk + "ffn_up_exps.weight", (n, n_ff, d), "ffn", layer=il)
    if shape.form == "gpt-oss":
        yield _bias(blk + "ffn_gate_inp.bias", n)
        yield _bias(blk + "ffn_gate_exps.bias", n, n_ff)
        yield _bias(blk + "ffn_down_exps.bias", n, d)
        yield _bias(blk + "ffn_up_exps.bias", n, n_ff)
    if shape.form == "qwen2moe":
        yield Tensor(blk + "ffn_gate_inp_shexp.weight", (d,), "f32", spread=d**-0.5)
        yield from _dense_ffn(shape, il, "_shexp", shape.n_ff)
    if shape.arch == "deepseek2":
        yield from _dense_ffn(shape, il, "_shexp", n_ff)
