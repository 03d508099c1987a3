"""Llama and its like: RMSNorm (or LayerNorm), rotary positions, grouped queries, no biases unless the config says so.

Llama and Mistral, ProSparse ("sparsellama"), Bamboo and TurboSparse-Mistral, MiniCPM, Arcee, Nemotron.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from gguf_tools.huggingface.activation import read_activation
from gguf_tools.huggingface.config import Config
from gguf_tools.huggingface.plan import Mapped, Plan, float32, matrix, norm, repeated, uint32
from gguf_tools.huggingface.rope import pairs_order, rope_values
from gguf_tools.source import Floats, KeyValue

_GATED = {"relu": "reglu", "relu2": "relu2", "fatrelu": "fatrelu"}
_MOE = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class _Style:
    """In what an architecture differs from Llama."""

    arch: str = "llama"
    activations: Mapping[str, str] = field(default_factory=lambda: _GATED)
    dense: str = "silu"  # what the engine computes for it where the file names no activation
    default_activation: str | None = "silu"
    gated: bool = True
    biases: bool = True  # the configuration may ask for them
    tied: bool = False  # unless the configuration says otherwise
    rotates_pairs: bool = True  # in the engine: rows of q and k are reordered
    ignored: str = ""


def plan_llama(config: Config, names: Container[str]) -> Plan:
    return _plan(config, _Style())


def plan_mistral(config: Config, names: Container[str]) -> Plan:
    # its window over the last tokens is left out, as in llama.cpp's own conversion
    return _plan(config, _Style(biases=False))


def plan_sparsellama(config: Config, names: Container[str]) -> Plan:
    return _plan(config, _Style(default_activation=None))


def plan_bamboo(config: Config, names: Container[str]) -> Plan:
    """The activation named in the configuration is that of both gate and up. TurboSparse ships predictors, which are
    not of this project's kind."""
    style = _Style(
        activations={"relu": "drelu"},
        dense="",
        default_activation=None,
        biases=False,
        ignored=r"model\.layers\.\d+\.mlp\.predictor\..*",
    )
    return _plan(config, style)


def plan_arcee(config: Config, names: Container[str]) -> Plan:
    style = _Style(
        "arcee", activations={"relu2": "relu2"}, dense="", default_activation="relu2", gated=False, biases=False
    )
    return _plan(config, style)


def plan_minicpm(config: Config, names: Container[str]) -> Plan:
    """llama.cpp, conversion/minicpm.py: the scales that its graph applies."""
    n_embd, n_layer = config.whole("hidden_size"), config.whole("num_hidden_layers")
    scales = {
        "minicpm.embedding_scale": float32(config.number("scale_emb")),
        "minicpm.residual_scale": float32(config.number("scale_depth") / n_layer**0.5),
        "minicpm.logit_scale": float32(n_embd / config.whole("dim_model_base")),
    }
    return _plan(config, _Style("minicpm", tied=True, biases=False), scales)


def plan_nemotron(config: Config, names: Container[str]) -> Plan:
    """LayerNorm whose weight is one more than what is stored; part of each head is rotated."""
    style = _Style(
        "nemotron",
        activations={"relu2": "relu2"},
        dense="",
        default_activation="relu2",
        gated=False,
        rotates_pairs=False,
    )
    return _plan(config, style)


def _plan(config: Config, style: _Style, more: Mapping[str, KeyValue] | None = None) -> Plan:
    arch = style.arch
    for key in _MOE:
        if config.whole(key, default=0, least=0) > 1:
            raise config.error("is more than one: mixtures of experts are not converted here", key)
    activation, activation_name = read_activation(
        config, "hidden_act", known=style.activations, dense=style.dense, default=style.default_activation
    )
    shape = _Shape.of(config)
    keys, constants = _values(config, style, shape)
    n_vocab = config.whole("vocab_size")
    nemotron = arch == "nemotron"
    if nemotron and shape.n_head * shape.head_dim != shape.n_embd:
        raise config.error(f"is {shape.head_dim}: the engine's nemotron wants hidden_size / heads", "head_dim")
    tensors = [
        Mapped("token_embd.weight", "model.embed_tokens.weight", (n_vocab, shape.n_embd)),
        *repeated(_layer(config, style, shape), shape.n_layer, "model.layers.{}."),
        *norm("output_norm", "model.norm", shape.n_embd, bias=nemotron, plus=float(nemotron)),
    ]
    # the engine's nemotron does not share the embeddings by itself
    tied = config.flag("tie_word_embeddings", default=style.tied)
    if not tied or nemotron:
        output = "model.embed_tokens.weight" if tied else "lm_head.weight"
        tensors.append(Mapped("output.weight", output, (n_vocab, shape.n_embd)))
    ignored = "|".join(part for part in (style.ignored, r"lm_head\.weight" if tied else "") if part)
    values = {f"{arch}.vocab_size": uint32(n_vocab), **keys, **(more or {})}
    return Plan(arch, n_vocab, activation, activation_name, values, tensors, constants, ignored)


@dataclass(frozen=True)
class _Shape:
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int

    @classmethod
    def of(cls, config: Config) -> _Shape:
        n_embd, n_head = config.whole("hidden_size"), config.whole("num_attention_heads")
        n_head_kv = config.whole("num_key_value_heads", default=n_head)
        head_dim = config.whole("head_dim", default=max(1, n_embd // n_head))
        if n_head % n_head_kv:
            raise config.error(f"is {n_head_kv}, which does not divide the {n_head} heads", "num_key_value_heads")
        if head_dim % 2 or (not config.has("head_dim") and n_embd % n_head):
            raise config.error(f"is {n_head}: hidden_size {n_embd} gives no even heads", "num_attention_heads")
        return cls(
            config.whole("num_hidden_layers"), n_embd, config.whole("intermediate_size"), n_head, n_head_kv, head_dim
        )


def _layer(config: Config, style: _Style, shape: _Shape) -> list[Mapped]:
    n_embd, n_ff = shape.n_embd, shape.n_ff
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    nemotron = style.arch == "nemotron"
    attn_bias = style.biases and config.flag("attention_bias", default=False)
    ffn_bias = style.biases and config.flag("mlp_bias", default=False)
    q_order = pairs_order(shape.n_head, shape.head_dim) if style.rotates_pairs else None
    k_order = pairs_order(shape.n_head_kv, shape.head_dim) if style.rotates_pairs else None
    gate = matrix("ffn_gate", "mlp.gate_proj", (n_ff, n_embd), bias=ffn_bias) if style.gated else []
    return [
        *norm("attn_norm", "input_layernorm", n_embd, bias=nemotron, plus=float(nemotron)),
        *matrix("attn_q", "self_attn.q_proj", (n_q, n_embd), bias=attn_bias, order=q_order),
        *matrix("attn_k", "self_attn.k_proj", (n_kv, n_embd), bias=attn_bias, order=k_order),
        *matrix("attn_v", "self_attn.v_proj", (n_kv, n_embd), bias=attn_bias),
        *matrix("attn_output", "self_attn.o_proj", (n_embd, n_q), bias=attn_bias),
        *norm("ffn_norm", "post_attention_layernorm", n_embd, bias=nemotron, plus=float(nemotron)),
        *gate,
        *matrix("ffn_up", "mlp.up_proj", (n_ff, n_embd), bias=ffn_bias),
        *matrix("ffn_down", "mlp.down_proj", (n_embd, n_ff), bias=ffn_bias),
    ]


def _values(config: Config, style: _Style, shape: _Shape) -> tuple[dict[str, KeyValue], dict[str, Floats]]:
    arch, n_rot = style.arch, shape.head_dim
    if arch == "nemotron":
        rope = config.section("rope_parameters")
        share = rope.number("partial_rotary_factor", default=config.number("partial_rotary_factor", default=0.5))
        n_rot = int(share * shape.head_dim)
        epsilon = {f"{arch}.attention.layer_norm_epsilon": float32(config.number("norm_eps", default=1e-5))}
    else:
        config.refuse("partial_rotary_factor", 1.0, f"the engine's {arch} rotates whole heads")
        epsilon = {f"{arch}.attention.layer_norm_rms_epsilon": float32(config.number("rms_norm_eps"))}
    rope_keys, constants = rope_values(config, arch, n_rot)
    values = {
        f"{arch}.context_length": uint32(config.whole("max_position_embeddings")),
        f"{arch}.embedding_length": uint32(shape.n_embd),
        f"{arch}.block_count": uint32(shape.n_layer),
        f"{arch}.feed_forward_length": uint32(shape.n_ff),
        f"{arch}.attention.head_count": uint32(shape.n_head),
        f"{arch}.attention.head_count_kv": uint32(shape.n_head_kv),
        f"{arch}.attention.key_length": uint32(shape.head_dim),
        f"{arch}.attention.value_length": uint32(shape.head_dim),
        **epsilon,
        **rope_keys,
    }
    return values, constants
