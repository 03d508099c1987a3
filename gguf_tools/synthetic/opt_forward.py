"""OPT in numpy, float32: what its feed-forward layers see and which neurons fire, for a model in a GGUF file.

A reference for files of this package, flash layouts too; not for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.neurons import dense_layers
from gguf_tools.source import Floats, open_gguf, row_count
from gguf_tools.synthetic.activity import Active, LayerActivity, layer_activity


@dataclass(frozen=True)
class LayerTrace:
    inputs: Floats  # [tokens, n_embd]: what up is multiplied with
    values: Floats  # [tokens, n_ff], after the ReLU
    predicted: Active | None  # [tokens, n_ff]


class OptFile:
    """Weights of an OPT, as float32."""

    def __init__(self, path: Path) -> None:
        source = open_gguf(path)
        self._tensors = source.tensors
        self._layers = dense_layers(source, path)
        self._values = source.values
        self.n_layer = int(self.value("opt.block_count"))
        self.n_head = int(self.value("opt.attention.head_count"))
        self.n_embd, self.n_vocab = self._tensors["token_embd.weight"].shape
        self.position_offset = int(self.value("opt.position_offset"))
        self.epsilon = float(self.value("opt.attention.layer_norm_epsilon"))

    def value(self, key: str) -> Any:
        return self._values[key].value

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Floats:
        """In numpy's order of dimensions."""
        tensor = self._tensors[name]
        return tensor.floats(0, row_count(tensor)).reshape(tensor.shape[::-1])

    def rows(self, name: str, rows: Sequence[int]) -> Floats:
        return np.concatenate([self._tensors[name].floats(row, row + 1) for row in rows])

    def feed_forward(self, il: int) -> tuple[Floats, Floats]:
        """up and the transposed down matrix, both [n_ff, n_embd]."""
        parts = self._layers[il].parts
        return parts["up"].floats(0, row_count(parts["up"])), parts["down"].floats(0, row_count(parts["down"]))


def trace(file: OptFile, tokens: Sequence[int]) -> Iterator[LayerTrace]:
    """Runs the model over one sequence, layer by layer."""
    offset = file.position_offset
    hidden = file.rows("token_embd.weight", tokens)
    hidden = hidden + file.rows("position_embd.weight", range(offset, offset + len(tokens)))
    for il in range(file.n_layer):
        hidden, layer = _layer(file, il, hidden)
        yield layer


def logits(file: OptFile, tokens: Sequence[int]) -> Floats:
    """[tokens, n_vocab]"""
    offset = file.position_offset
    embeddings = file.tensor("token_embd.weight")
    hidden = embeddings[list(tokens)] + file.rows("position_embd.weight", range(offset, offset + len(tokens)))
    for il in range(file.n_layer):
        hidden, _ = _layer(file, il, hidden)
    return np.asarray(_norm(file, "output_norm", hidden) @ embeddings.T, np.float32)


def measure_activity(
    path: Path, tokens: Sequence[int], on_layer: Callable[[int, LayerActivity], None] | None = None
) -> list[LayerActivity]:
    """Activation statistics of each layer over one sequence of tokens."""
    measured: list[LayerActivity] = []
    for il, layer in enumerate(trace(OptFile(path), tokens)):
        measured.append(layer_activity(layer.values, layer.predicted))
        if on_layer:
            on_layer(il, measured[-1])
    return measured


def _layer(file: OptFile, il: int, hidden: Floats) -> tuple[Floats, LayerTrace]:
    hidden = hidden + _attention(file, il, _norm(file, f"blk.{il}.attn_norm", hidden))
    inputs = _norm(file, f"blk.{il}.ffn_norm", hidden)
    up, down = file.feed_forward(il)
    values = np.maximum(inputs @ up.T + file.tensor(f"blk.{il}.ffn_up.bias"), 0)
    hidden = hidden + values @ down + file.tensor(f"blk.{il}.ffn_down.bias")
    predicted = None
    if f"blk.{il}.ffn_predictor.bias" in file:
        code = inputs @ file.tensor(f"blk.{il}.ffn_predictor_in.weight").T
        scores = code @ file.tensor(f"blk.{il}.ffn_predictor_out.weight").T
        predicted = scores + file.tensor(f"blk.{il}.ffn_predictor.bias") > 0
    return hidden, LayerTrace(inputs, values, predicted)


def _linear(file: OptFile, name: str, values: Floats) -> Floats:
    return np.asarray(values @ file.tensor(f"{name}.weight").T + file.tensor(f"{name}.bias"), np.float32)


def _attention(file: OptFile, il: int, values: Floats) -> Floats:
    n_tokens, n_embd = values.shape
    size = n_embd // file.n_head
    query, key, value = (
        _linear(file, f"blk.{il}.attn_{part}", values).reshape(n_tokens, file.n_head, size).transpose(1, 0, 2)
        for part in "qkv"
    )
    scores = query @ key.transpose(0, 2, 1) / np.float32(size**0.5)
    scores[:, np.triu(np.ones((n_tokens, n_tokens), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = (weights @ value).transpose(1, 0, 2).reshape(n_tokens, n_embd)
    return _linear(file, f"blk.{il}.attn_output", mixed)


def _norm(file: OptFile, name: str, values: Floats) -> Floats:
    centred = values - values.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(variance + np.float32(file.epsilon))
    return np.asarray(scaled * file.tensor(f"{name}.weight") + file.tensor(f"{name}.bias"), np.float32)
