"""Rotary positions: key-values, and the order of rows that the engine's way of rotating needs."""

from __future__ import annotations

import math

import numpy as np

from gguf_tools.huggingface.config import Config
from gguf_tools.huggingface.plan import Order, float32, string, uint32
from gguf_tools.source import Floats, KeyValue

_DEFAULT_THETA = 10000.0
# of yarn: those that the engine has, or sets whatever the file says (llama_cpp/llama.py)
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}


def pairs_order(n_head: int, head_dim: int) -> Order:
    """transformers rotates element i of a head with element i + head_dim / 2, llama.cpp (for some architectures)
    element 2 i with 2 i + 1: rows of q and k in that order (conversion/llama.py, LlamaModel.permute)."""
    rows = np.arange(n_head * head_dim).reshape(n_head, 2, head_dim // 2)
    return np.asarray(rows.swapaxes(1, 2).reshape(-1), np.int64)


def rope_values(config: Config, arch: str, n_rot: int) -> tuple[dict[str, KeyValue], dict[str, Floats]]:
    """Key-values, and tensors that go with them. n_rot: elements of a head that are rotated.

    Raises GgufToolsError for a scaling that the engine does not compute as transformers does.
    """
    scaling = config.section("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    theta = scaling.number("rope_theta", default=config.number("rope_theta", default=_DEFAULT_THETA))
    values = {f"{arch}.rope.dimension_count": uint32(n_rot), f"{arch}.rope.freq_base": float32(theta)}
    kind = scaling.text("rope_type", "type", default="default").lower()
    if kind == "default":
        return values, {}
    if kind == "llama3":
        return values, {"rope_freqs.weight": _llama3_factors(scaling, theta, n_rot)}
    if kind not in ("linear", "yarn"):
        raise scaling.error(f"scaling of rotary positions {kind!r}, known: linear, yarn, llama3", "rope_scaling")
    values[f"{arch}.rope.scaling.type"] = string(kind)
    values[f"{arch}.rope.scaling.factor"] = float32(scaling.number("factor"))
    if kind == "yarn":
        for key, usual in _YARN.items():
            scaling.refuse(key, usual, f"yarn as the engine computes it has {usual}")
        length = scaling.whole("original_max_position_embeddings", default=config.whole("max_position_embeddings"))
        values[f"{arch}.rope.scaling.original_context_length"] = uint32(length)
    return values, {}


def _llama3_factors(scaling: Config, theta: float, n_rot: int) -> Floats:
    """What the engine divides each frequency by (transformers, modeling_rope_utils.py)."""
    factor, low, high = (scaling.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = scaling.whole("original_max_position_embeddings")
    if high <= low or factor <= 0:
        raise scaling.error(f"is {high}, not more than low_freq_factor", "high_freq_factor")
    wavelengths = 2 * math.pi * theta ** (np.arange(0, n_rot, 2) / n_rot)
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)
