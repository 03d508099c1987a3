"""What transformers computes for those checkpoints, in numpy: logits from the weights as the checkpoint holds them.

Written after transformers' modelling code (models/opt, llama, falcon, nemotron, and the model cards' own code for the
others): another layout of q, k and v than the engine's, so that a wrong order of rows shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from checkpoints import HEADS, HEADS_KV, LAYERS, Checkpoint, Floats


def logits(checkpoint: Checkpoint, tokens: Sequence[int]) -> Floats:
    """[tokens, vocabulary]"""
    model_type = checkpoint.config["model_type"]
    forward = {"opt": _opt, "falcon": _falcon}.get(model_type, _llama)
    return np.asarray(forward(checkpoint, list(tokens)), np.float32)


class _Weights:
    def __init__(self, checkpoint: Checkpoint, prefix: str = "") -> None:
        self._weights, self._prefix = {k: v.astype(np.float64) for k, v in checkpoint.weights.items()}, prefix

    def under(self, prefix: str) -> _Weights:
        found = _Weights.__new__(_Weights)
        found._weights, found._prefix = self._weights, self._prefix + prefix
        return found

    def __getitem__(self, name: str) -> Floats:
        return self._weights[self._prefix + name]

    def get(self, name: str) -> Floats | float:
        return self._weights.get(self._prefix + name, 0.0)

    def linear(self, name: str, x: Floats) -> Floats:
        return x @ self[f"{name}.weight"].T + self.get(f"{name}.bias")

    def layer_norm(self, name: str, x: Floats, plus: float = 0.0) -> Floats:
        x = x - x.mean(-1, keepdims=True)
        return (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (self[f"{name}.weight"] + plus) + self[f"{name}.bias"]
        )

    def rms_norm(self, name: str, x: Floats) -> Floats:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * self[f"{name}.weight"]


def _attention(q: Floats, k: Floats, v: Floats) -> Floats:
    """q [heads, tokens, head_dim]; k and v may have fewer heads."""
    k, v = (np.repeat(t, len(q) // len(t), axis=0) for t in (k, v))
    scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ v
    return out.swapaxes(0, 1).reshape(q.shape[1], -1)


def _heads(x: Floats, n: int) -> Floats:
    return x.reshape(len(x), n, -1).swapaxes(0, 1)


def _opt(checkpoint: Checkpoint, tokens: list[int]) -> Floats:
    config = checkpoint.config
    prefix = "model.decoder." if "model.decoder.embed_tokens.weight" in checkpoint.weights else "decoder."
    weights, before = _Weights(checkpoint, prefix), config["do_layer_norm_before"]
    x = weights["embed_tokens.weight"][tokens]
    if config["word_embed_proj_dim"] != config["hidden_size"]:
        x = weights.linear("project_in", x)
    x = x + weights["embed_positions.weight"][2 : 2 + len(tokens)]
    for il in range(LAYERS):
        layer = weights.under(f"layers.{il}.")
        h = layer.layer_norm("self_attn_layer_norm", x) if before else x
        q, k, v = (_heads(layer.linear(f"self_attn.{name}_proj", h), HEADS) for name in "qkv")
        x = x + layer.linear("self_attn.out_proj", _attention(q, k, v))
        x = x if before else layer.layer_norm("self_attn_layer_norm", x)
        h = layer.layer_norm("final_layer_norm", x) if before else x
        x = x + layer.linear("fc2", np.maximum(layer.linear("fc1", h), 0))
        x = x if before else layer.layer_norm("final_layer_norm", x)
    if before:
        x = weights.layer_norm("final_layer_norm", x)
    if config["word_embed_proj_dim"] != config["hidden_size"]:
        x = weights.linear("project_out", x)
    head = weights["embed_tokens.weight"] if config["tie_word_embeddings"] else _Weights(checkpoint)["lm_head.weight"]
    return x @ head.T


def _llama(checkpoint: Checkpoint, tokens: list[int]) -> Floats:
    config = checkpoint.config
    weights, kind = _Weights(checkpoint, "model."), config["model_type"]

    def norm(where: _Weights, name: str, x: Floats) -> Floats:
        return where.layer_norm(name, x, plus=1.0) if kind == "nemotron" else where.rms_norm(name, x)

    minicpm = kind == "minicpm"
    residual = config["scale_depth"] / math.sqrt(LAYERS) if minicpm else 1.0
    x = weights["embed_tokens.weight"][tokens] * (config["scale_emb"] if minicpm else 1.0)
    for il in range(LAYERS):
        layer = weights.under(f"layers.{il}.")
        h = norm(layer, "input_layernorm", x)
        q = _rotate(_heads(layer.linear("self_attn.q_proj", h), HEADS), checkpoint)
        k = _rotate(_heads(layer.linear("self_attn.k_proj", h), HEADS_KV), checkpoint)
        v = _heads(layer.linear("self_attn.v_proj", h), HEADS_KV)
        x = x + residual * layer.linear("self_attn.o_proj", _attention(q, k, v))
        x = x + residual * _mlp(layer.under("mlp."), norm(layer, "post_attention_layernorm", x), checkpoint)
    x = norm(weights, "norm", x)
    if minicpm:
        x = x / (config["hidden_size"] / config["dim_model_base"])
    tied = config["tie_word_embeddings"]
    return x @ (weights["embed_tokens.weight"] if tied else _Weights(checkpoint)["lm_head.weight"]).T


def _mlp(mlp: _Weights, x: Floats, checkpoint: Checkpoint) -> Floats:
    config = checkpoint.config
    functions = {
        "relu": lambda t: np.maximum(t, 0),
        "relu2": lambda t: np.maximum(t, 0) ** 2,
        "fatrelu": lambda t: np.where(t > config["hidden_act_param"], t, 0),
        "silu": lambda t: t / (1 + np.exp(-t)),
    }
    function = functions[config["hidden_act"]]
    up = mlp.linear("up_proj", x)
    if config["model_type"] in ("arcee", "nemotron"):
        return mlp.linear("down_proj", function(up))
    gate = function(mlp.linear("gate_proj", x))
    return mlp.linear("down_proj", gate * (function(up) if config["model_type"] == "bamboo" else up))


def _rotate(x: Floats, checkpoint: Checkpoint) -> Floats:
    """x [heads, tokens, head_dim]: halves of the rotated part belong together."""
    config = checkpoint.config
    n_rot = int(x.shape[-1] * config.get("partial_rotary_factor", 1.0))
    theta, scaling = config.get("rope_theta", 10000.0), config.get("rope_scaling") or {}
    frequencies = []
    for i in range(0, n_rot, 2):
        frequency = theta ** (-i / n_rot)
        if scaling.get("type") == "linear":
            frequency /= scaling["factor"]
        if scaling.get("rope_type") == "llama3":
            length, wavelength = scaling["original_max_position_embeddings"], 2 * math.pi / frequency
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if wavelength > length / low:
                frequency /= scaling["factor"]
            elif wavelength >= length / high:
                smooth = (length / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
        frequencies.append(frequency)
    size = 1.0
    if scaling.get("type") == "yarn":
        frequencies = _yarn(frequencies, n_rot, theta, scaling)
        size = 1 + 0.1 * math.log(scaling["factor"])
    angles = np.arange(x.shape[1])[:, None] * np.array(frequencies)
    rotated, rest = x[..., :n_rot], x[..., n_rot:]
    a, b = rotated[..., : n_rot // 2], rotated[..., n_rot // 2 :]
    cos, sin = size * np.cos(angles), size * np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _yarn(frequencies: list[float], n_rot: int, theta: float, scaling: dict[str, Any]) -> list[float]:
    """Low frequencies are divided by the factor, high ones stay, those between are mixed."""
    length = scaling["original_max_position_embeddings"]
    fast, slow = (n_rot * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (32, 1))
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), n_rot - 1)
    shares = [min(max((i - low) / (high - low), 0), 1) for i in range(n_rot // 2)]
    return [f * (1 - share) + f / scaling["factor"] * share for f, share in zip(frequencies, shares, strict=True)]


def _falcon(checkpoint: Checkpoint, tokens: list[int]) -> Floats:
    weights, new = _Weights(checkpoint, "transformer."), checkpoint.config["new_decoder_architecture"]
    n_kv, n_tokens = HEADS_KV if new else 1, len(tokens)
    x = weights["word_embeddings.weight"][tokens]
    for il in range(LAYERS):
        layer = weights.under(f"h.{il}.")
        attn_in = layer.layer_norm("ln_attn" if new else "input_layernorm", x)
        mlp_in = layer.layer_norm("ln_mlp", x) if new else attn_in
        fused = layer.linear("self_attention.query_key_value", attn_in)
        fused = fused.reshape(n_tokens, n_kv, HEADS // n_kv + 2, -1)
        q = fused[:, :, :-2].reshape(n_tokens, HEADS, -1).swapaxes(0, 1)
        k, v = fused[:, :, -2].swapaxes(0, 1), fused[:, :, -1].swapaxes(0, 1)
        attention = _attention(_rotate(q, checkpoint), _rotate(k, checkpoint), v)
        mlp = layer.linear("mlp.dense_4h_to_h", np.maximum(layer.linear("mlp.dense_h_to_4h", mlp_in), 0))
        x = x + layer.linear("self_attention.dense", attention) + mlp
    return weights.layer_norm("ln_f", x) @ weights["word_embeddings.weight"].T
