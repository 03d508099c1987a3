"""Falcon (transformers, models/falcon): attention and feed-forward side by side, one fused matrix for q, k and v.

Also the RefinedWeb checkpoints of before it was part of transformers.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from gguf_tools.huggingface.activation import read_activation
from gguf_tools.huggingface.config import Config
from gguf_tools.huggingface.plan import Mapped, Order, Plan, float32, matrix, norm, repeated, string, uint32
from gguf_tools.huggingface.rope import rope_values


def plan_falcon(config: Config, names: Container[str]) -> Plan:
    activation, activation_name = read_activation(
        config, "activation", "hidden_act", known={"relu": "relu"}, dense="gelu", default="gelu"
    )
    for key, usual in (("alibi", False), ("bias", False), ("parallel_attn", True)):
        config.refuse(key, usual, "the engine's falcon does not know that")
    n_embd, n_layer = config.whole("hidden_size", "n_embed"), config.whole("num_hidden_layers", "n_layer")
    n_head, n_vocab = config.whole("num_attention_heads", "n_head"), config.whole("vocab_size")
    n_ff = config.whole("ffn_hidden_size", default=4 * n_embd)
    new = config.flag("new_decoder_architecture", default=config.text("model_type", default="") == "RefinedWeb")
    n_head_kv = _n_head_kv(config, n_head, new=new)
    if n_embd % n_head or n_head % n_head_kv or n_embd // n_head % 2:
        message = f"is {n_head}, which does not fit hidden_size {n_embd} and {n_head_kv} heads of k and v"
        raise config.error(message, "num_attention_heads")
    head_dim = n_embd // n_head

    two_norms = new and config.whole("num_ln_in_parallel_attn", default=2) == 2
    norms = (
        [*norm("attn_norm", "ln_mlp", n_embd, bias=True), *norm("attn_norm_2", "ln_attn", n_embd, bias=True)]
        if two_norms
        else norm("attn_norm", "input_layernorm", n_embd, bias=True)
    )
    n_qkv = (n_head + 2 * n_head_kv) * head_dim
    order = _qkv_order(n_head, n_head_kv, head_dim)
    layer = [
        *norms,
        *matrix("attn_qkv", "self_attention.query_key_value", (n_qkv, n_embd), bias=False, order=order),
        *matrix("attn_output", "self_attention.dense", (n_embd, n_embd), bias=False),
        *matrix("ffn_up", "mlp.dense_h_to_4h", (n_ff, n_embd), bias=False),
        *matrix("ffn_down", "mlp.dense_4h_to_h", (n_embd, n_ff), bias=False),
    ]
    tensors = [
        Mapped("token_embd.weight", "transformer.word_embeddings.weight", (n_vocab, n_embd)),
        *repeated(layer, n_layer, "transformer.h.{}."),
        *norm("output_norm", "transformer.ln_f", n_embd, bias=True),
    ]
    tied = config.flag("tie_word_embeddings", default=True)
    if not tied:
        tensors.append(Mapped("output.weight", "lm_head.weight", (n_vocab, n_embd)))
    rope_keys, constants = rope_values(config, "falcon", head_dim)
    for name in constants:
        raise config.error(f"the engine's falcon has no {name}", "rope_scaling")
    values = {
        "falcon.context_length": uint32(config.whole("max_position_embeddings", default=2048)),
        "falcon.tensor_data_layout": string("jploski"),  # q, k and v one after the other
        "falcon.embedding_length": uint32(n_embd),
        "falcon.feed_forward_length": uint32(n_ff),
        "falcon.block_count": uint32(n_layer),
        "falcon.attention.head_count": uint32(n_head),
        "falcon.attention.head_count_kv": uint32(n_head_kv),
        "falcon.attention.layer_norm_epsilon": float32(config.number("layer_norm_epsilon", default=1e-5)),
        "falcon.vocab_size": uint32(n_vocab),
        **rope_keys,
    }
    ignored = r"lm_head\.weight" if tied else ""
    return Plan("falcon", n_vocab, activation, activation_name, values, tensors, ignored=ignored)


def _n_head_kv(config: Config, n_head: int, *, new: bool) -> int:
    if not new and config.flag("multi_query", default=True):
        return 1  # whatever num_kv_heads says, which transformers does not look at then
    return config.whole("num_kv_heads", "n_head_kv", default=n_head)


def _qkv_order(n_head: int, n_head_kv: int, head_dim: int) -> Order:
    """The checkpoint has, for each head of k and v, the heads of q that use it, then k, then v; the engine wants all
    of q, all of k, all of v (llama.cpp, conversion/falcon.py)."""
    n_rows = (n_head + 2 * n_head_kv) * head_dim
    heads = np.arange(n_rows).reshape(n_head_kv, n_head // n_head_kv + 2, head_dim)
    return np.concatenate([part.reshape(-1) for part in (heads[:, :-2], heads[:, -2], heads[:, -1])])
