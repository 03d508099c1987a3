"""OPT (transformers, models/opt): learned positions, LayerNorm, biases, ReLU."""

from __future__ import annotations

from collections.abc import Container

from gguf_tools.huggingface.activation import read_activation
from gguf_tools.huggingface.config import Config
from gguf_tools.huggingface.plan import Mapped, Plan, boolean, float32, matrix, norm, repeated, uint32

_EPSILON = 1e-5  # torch's for a LayerNorm; not in config.json
_POSITION_OFFSET = 2  # row of the first position


def plan_opt(config: Config, names: Container[str]) -> Plan:
    activation, activation_name = read_activation(config, "activation_function", known={"relu": "relu"}, default="relu")
    config.refuse("layer_norm_elementwise_affine", True, "the engine's OPT has norms with weights")
    n_embd, n_ff = config.whole("hidden_size", "d_model"), config.whole("ffn_dim")
    n_layer, n_head = config.whole("num_hidden_layers"), config.whole("num_attention_heads")
    n_ctx, n_vocab = config.whole("max_position_embeddings"), config.whole("vocab_size")
    n_word = config.whole("word_embed_proj_dim", default=n_embd)
    if n_embd % n_head:
        raise config.error(f"is {n_head}, which does not divide hidden_size, {n_embd}", "num_attention_heads")
    norm_before = config.flag("do_layer_norm_before", default=True)
    if norm_before:
        config.refuse("_remove_final_layer_norm", False, "the engine's OPT has a norm before the output")
    config.refuse("enable_bias", True, "the engine's OPT has biases")
    # checkpoints of before transformers 4.20 lack the first part
    decoder = "model.decoder." if "model.decoder.embed_tokens.weight" in names else "decoder."

    tensors = [
        Mapped("token_embd.weight", f"{decoder}embed_tokens.weight", (n_vocab, n_word)),
        Mapped("position_embd.weight", f"{decoder}embed_positions.weight", (n_ctx + _POSITION_OFFSET, n_embd)),
    ]
    if n_word != n_embd:
        tensors += matrix("project_in", f"{decoder}project_in", (n_embd, n_word), bias=False)
    layer = [
        *norm("attn_norm", "self_attn_layer_norm", n_embd, bias=True),
        *matrix("attn_q", "self_attn.q_proj", (n_embd, n_embd), bias=True),
        *matrix("attn_k", "self_attn.k_proj", (n_embd, n_embd), bias=True),
        *matrix("attn_v", "self_attn.v_proj", (n_embd, n_embd), bias=True),
        *matrix("attn_output", "self_attn.out_proj", (n_embd, n_embd), bias=True),
        *norm("ffn_norm", "final_layer_norm", n_embd, bias=True),
        *matrix("ffn_up", "fc1", (n_ff, n_embd), bias=True),
        *matrix("ffn_down", "fc2", (n_embd, n_ff), bias=True),
    ]
    tensors += repeated(layer, n_layer, f"{decoder}layers.{{}}.")
    if norm_before:
        tensors += norm("output_norm", f"{decoder}final_layer_norm", n_embd, bias=True)
    if n_word != n_embd:
        tensors += matrix("project_out", f"{decoder}project_out", (n_word, n_embd), bias=False)
    tied = config.flag("tie_word_embeddings", default=True)
    if not tied:
        tensors.append(Mapped("output.weight", "lm_head.weight", (n_vocab, n_word)))

    values = {
        "opt.context_length": uint32(n_ctx),
        "opt.embedding_length": uint32(n_embd),
        "opt.block_count": uint32(n_layer),
        "opt.feed_forward_length": uint32(n_ff),
        "opt.attention.head_count": uint32(n_head),
        "opt.attention.head_count_kv": uint32(n_head),
        "opt.attention.layer_norm_epsilon": float32(_EPSILON),
        "opt.position_offset": uint32(_POSITION_OFFSET),
        "opt.vocab_size": uint32(n_vocab),
    }
    if not norm_before:
        values["opt.layer_norm_after"] = boolean(True)
    if n_word != n_embd:
        values["opt.embedding_projection_length"] = uint32(n_word)
    ignored = r"(model\.)?decoder\.version" + (r"|lm_head\.weight" if tied else "")
    return Plan("opt", n_vocab, activation, activation_name, values, tensors, ignored=ignored)
