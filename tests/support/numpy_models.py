"""Tiny dense models with random weights: written as GGUF in F32, and computed in float64 without the engine.

The forward passes follow Hugging Face's modeling_opt.py and modeling_llama.py; weights go by their GGUF names, and have
numpy's shapes: rows first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from gguf_tools.synthetic.tokenizer import add_tokenizer

Array = npt.NDArray[np.float64]

N_VOCAB = 260


@dataclass(frozen=True)
class Activation:
    """The function between up and down: `value(g, u)` of a gated layer, `value(u, u)` of one without a gate."""

    value: Callable[[Array, Array], Array]
    gated: bool


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


THRESHOLD = 0.25  # of fatrelu
ACTIVATIONS: dict[str, list[Activation]] = {
    "relu": [Activation(lambda g, u: _relu(u), False)],
    "relu2": [Activation(lambda g, u: _relu(u) ** 2, False), Activation(lambda g, u: _relu(g) ** 2 * u, True)],
    "silu": [Activation(lambda g, u: _silu(u), False), Activation(lambda g, u: _silu(g) * u, True)],
    "reglu": [Activation(lambda g, u: _relu(g) * u, True)],
    "fatrelu": [Activation(lambda g, u: np.where(g > THRESHOLD, g * u, 0), True)],
    "drelu": [Activation(lambda g, u: _relu(g) * _relu(u), True)],
}


def activation(name: str, gated: bool) -> Activation:
    return next(one for one in ACTIVATIONS[name] if one.gated == gated)


def array_of(kind: gguf.GGUFValueType, values: list[Any]) -> tuple[list[Any], gguf.GGUFValueType]:
    """A value for `write_gguf`: an array whose elements have this type."""
    return values, kind


def write_gguf(path: Path, arch: str, keys: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> Path:
    """Keys are typed by their values: bool, int (uint32), np.uint64, float, str, list of str, or `array_of`.

    A tensor of uint8 becomes one of GGML_TYPE_FLASH.
    """
    flash = 17996
    gguf.GGML_QUANT_SIZES.setdefault(flash, (1, 1))
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, tuple):
            writer.add_key_value(key, value[0], gguf.GGUFValueType.ARRAY, value[1])
        elif isinstance(value, np.uint64):
            writer.add_uint64(key, int(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            writer.add_uint32(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    add_tokenizer(writer, N_VOCAB)
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=flash if data.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass(frozen=True)
class TinyModel:
    """arch: opt, llama (gated) or arcee (llama without gates)."""

    arch: str
    activation: Activation
    keys: dict[str, Any] = field(default_factory=dict)  # in addition to the usual ones, without the architecture's name
    seed: int = 0
    n_layer: int = 2
    n_embd: int = 64
    n_ff: int = 96
    n_head: int = 4
    n_ctx_train: int = 256
    post_norm: bool = False  # opt
    n_embd_proj: int = 0  # opt
    position_offset: int = 2  # opt
    tied: bool = True

    @property
    def gated(self) -> bool:
        return self.arch == "llama"

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        rng = np.random.default_rng(self.seed)

        def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
            return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

        def vector(n: int, mean: float) -> npt.NDArray[np.float32]:
            return (mean + 0.2 * rng.standard_normal(n)).astype(np.float32)

        opt = self.arch == "opt"
        n_embd, n_tok = self.n_embd, self.n_embd_proj or self.n_embd
        found = {"token_embd.weight": matrix(N_VOCAB, n_tok) * np.float32(np.sqrt(n_tok))}
        if not self.tied:
            found["output.weight"] = matrix(N_VOCAB, n_tok)
        if opt:
            found["position_embd.weight"] = matrix(self.n_ctx_train + self.position_offset, n_embd) * np.float32(8)
        if self.n_embd_proj:
            found["project_in.weight"] = matrix(n_embd, n_tok)
            found["project_out.weight"] = matrix(n_tok, n_embd)
        norms = [] if self.post_norm else ["output_norm"]
        matrices = {}
        for il in range(self.n_layer):
            norms += [f"blk.{il}.attn_norm", f"blk.{il}.ffn_norm"]
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                matrices[f"blk.{il}.{name}"] = matrix(n_embd, n_embd)
            for name in ("ffn_gate", "ffn_up")[not self.gated :]:
                matrices[f"blk.{il}.{name}"] = matrix(self.n_ff, n_embd)
            matrices[f"blk.{il}.ffn_down"] = matrix(n_embd, self.n_ff)
        for name in norms:
            found[f"{name}.weight"] = vector(n_embd, 1.0)
        for name, data in matrices.items():
            found[f"{name}.weight"] = data
        if opt:
            found |= {f"{name}.bias": vector(n_embd, 0.0) for name in norms}
            found |= {f"{name}.bias": vector(len(data), 0.0) for name, data in matrices.items()}
        return found

    def all_keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "block_count": self.n_layer,
            "context_length": self.n_ctx_train,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head,
        }
        if self.arch == "opt":
            keys["attention.layer_norm_epsilon"] = 1e-5
            if self.position_offset != 2:
                keys["position_offset"] = self.position_offset
            if self.post_norm:
                keys["layer_norm_after"] = True
            if self.n_embd_proj:
                keys["embedding_projection_length"] = self.n_embd_proj
        else:
            keys["attention.layer_norm_rms_epsilon"] = 1e-5
            keys["rope.dimension_count"] = self.n_embd // self.n_head
        return {f"{self.arch}.{key}": value for key, value in (keys | self.keys).items()}

    def write(self, path: Path) -> Path:
        return write_gguf(path, self.arch, self.all_keys(), self.weights())

    def logits(self, tokens: list[int]) -> Array:
        """[tokens, vocabulary]"""
        w = {name: data.astype(np.float64) for name, data in self.weights().items()}
        opt = self.arch == "opt"

        def linear(name: str, x: Array) -> Array:
            return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

        def norm(name: str, x: Array) -> Array:
            if opt:
                x = x - x.mean(axis=-1, keepdims=True)
            x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
            return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

        def heads(x: Array) -> Array:
            """[head, token, channel]"""
            return x.reshape(len(tokens), self.n_head, -1).transpose(1, 0, 2)

        def attention(prefix: str, x: Array) -> Array:
            q, k, v = (heads(linear(f"{prefix}attn_{name}", x)) for name in "qkv")
            if not opt:
                q, k = _rotated(q), _rotated(k)
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
            scores[:, ~np.tri(len(tokens), dtype=bool)] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            return linear(f"{prefix}attn_output", (weights @ v).transpose(1, 0, 2).reshape(len(tokens), -1))

        def feed_forward(prefix: str, x: Array) -> Array:
            up = linear(f"{prefix}ffn_up", x)
            gate = linear(f"{prefix}ffn_gate", x) if self.gated else up
            return linear(f"{prefix}ffn_down", self.activation.value(gate, up))

        x = w["token_embd.weight"][tokens]
        if self.n_embd_proj:
            x = linear("project_in", x)
        if opt:
            last = self.n_ctx_train - 1
            rows = [min(position, last) + self.position_offset for position in range(len(tokens))]
            x = x + w["position_embd.weight"][rows]
        for il in range(self.n_layer):
            p = f"blk.{il}."
            if self.post_norm:
                x = norm(f"{p}attn_norm", x + attention(p, x))
                x = norm(f"{p}ffn_norm", x + feed_forward(p, x))
            else:
                x = x + attention(p, norm(f"{p}attn_norm", x))
                x = x + feed_forward(p, norm(f"{p}ffn_norm", x))
        if not self.post_norm:
            x = norm("output_norm", x)
        if self.n_embd_proj:
            x = linear("project_out", x)
        return linear("token_embd" if self.tied else "output", x)


def _rotated(x: Array) -> Array:
    """llama's rotary embedding as GGUF files want it: pairs of neighbouring channels. x: [head, token, channel]"""
    n = x.shape[-1]
    angles = np.outer(np.arange(x.shape[1]), 10000.0 ** (-np.arange(0, n, 2) / n))
    sin, cos = np.sin(angles), np.cos(angles)
    rotated = np.empty_like(x)
    rotated[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    rotated[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return rotated


# so that the engine's attention is computed in F32 too
F32_ATTENTION: dict[str, Any] = {"type_k": 0, "type_v": 0, "flash_attn": False, "n_ctx": 256}


def assert_close(actual: npt.NDArray[np.float32], expected: Array) -> None:
    """To 1e-4 of the range of the logits, which must say something."""
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert len(np.unique(expected.argmax(axis=1))) > 3, "these logits say nothing"
    spread = expected.max() - expected.min()
    assert np.abs(actual - expected).max() < 1e-4 * spread
