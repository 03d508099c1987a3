"""A synthetic OPT whose activation statistics are known: its tensors, layer by layer.

The residual stream is dominated by the embeddings, which carry the tokens' codes (codes.py) in WIDTH of their
directions and noise in all of them; attention and FFN add little to it, in total `_GROWTH`. So the codes survive all
layers, and the up matrices read them (sparsity.py). The output is tied; the signs in the last norm's weights make its
logits differ from a mere copy of the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from gguf import GGMLQuantizationType as T

from gguf_tools import ggml
from gguf_tools.source import Bytes, Floats
from gguf_tools.synthetic.codes import WIDTH, Codes
from gguf_tools.synthetic.sparsity import Plan, Sparsity, plan
from gguf_tools.synthetic.weights import BlockPool, rng_for

# Variances in units of that of the embeddings' entries, 1.
_CODE_SHARE = 0.5  # of an embedding's variance
_POSITIONS = 0.01
_GROWTH = 0.35  # what all layers together add
_ATTENTION = 0.3  # share of that which comes from attention
_LOGITS = 3.0  # standard deviation of the logits
_CHUNK = 1024  # rows made at a time


@dataclass(frozen=True)
class OptShape:
    n_layer: int = 8
    n_embd: int = 4096
    n_ff: int = 16384
    n_head: int = 32
    n_vocab: int = 50272
    n_ctx: int = 2048

    position_offset = 2

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or self.n_embd < 2 * WIDTH:
            raise ValueError(f"n_embd must be a multiple of n_head and at least {2 * WIDTH}, got {self.n_embd}")


@dataclass(frozen=True)
class OptModel:
    shape: OptShape = OptShape()
    kind: T = T.F16  # of the matrices; F16 or Q8_0
    seed: int = 0
    sparsity: Sparsity = field(default_factory=Sparsity)
    coactive: bool = False  # neurons that fire together lie together

    def layer(self, il: int) -> Layer:
        return Layer(self, il)

    @cached_property
    def codes(self) -> Codes:
        return Codes(self.shape.n_vocab, self.seed)

    @cached_property
    def code_directions(self) -> Floats:
        """Orthonormal directions of the residual stream that carry the code: [n_embd, WIDTH]."""
        random = rng_for(self.seed, "code directions").standard_normal((self.shape.n_embd, WIDTH))
        return np.linalg.qr(random)[0].astype(np.float32)

    @cached_property
    def pool(self) -> BlockPool:
        return BlockPool(self.seed, elements=1 << (21 if self.shape.n_embd > 1024 else 18))

    def embeddings(self) -> Iterator[Bytes]:
        """token_embd.weight, some rows at a time."""
        codes = self.codes.matrix() * np.float32((_CODE_SHARE * self.shape.n_embd / WIDTH) ** 0.5)
        rng = rng_for(self.seed, "token_embd.weight")
        for start in range(0, len(codes), _CHUNK):
            part = codes[start : start + _CHUNK]
            values = rng.standard_normal((len(part), self.shape.n_embd), dtype=np.float32)
            values *= np.float32((1 - _CODE_SHARE) ** 0.5)
            values += part @ self.code_directions.T
            yield ggml.quantize(values, self.kind)

    def positions(self) -> Floats:
        rows = self.shape.n_ctx + self.shape.position_offset
        return self.normal("position_embd.weight", (rows, self.shape.n_embd), _POSITIONS**0.5)

    def output_norm(self) -> Floats:
        weight = self.norm_weight("output_norm.weight") * np.float32(_LOGITS / self.shape.n_embd**0.5)
        signs = rng_for(self.seed, "output signs").integers(0, 2, self.shape.n_embd) * 2 - 1
        return np.asarray(weight * signs, np.float32)

    def norm_weight(self, name: str) -> Floats:
        return 1 + self.normal(name, (self.shape.n_embd,), 0.1)

    def normal(self, name: str, shape: tuple[int, ...], sigma: float) -> Floats:
        values = rng_for(self.seed, name).standard_normal(shape, dtype=np.float32)
        values *= np.float32(sigma)
        return values


@dataclass(frozen=True)
class Layer:
    model: OptModel
    il: int

    @cached_property
    def plan(self) -> Plan:
        model, shape = self.model, self.model.shape
        return plan(model.sparsity, self.il, shape.n_layer, shape.n_ff, model.seed, coactive=model.coactive)

    def name(self, tensor: str) -> str:
        return f"blk.{self.il}.{tensor}"

    def attention(self, part: str) -> Bytes:
        """attn_q, attn_k, attn_v or attn_output: [n_embd, bytes of a row]."""
        n_embd = self.model.shape.n_embd
        power = _ATTENTION * _GROWTH / self.model.shape.n_layer if part == "attn_output" else 1.0
        sigma = (power / n_embd) ** 0.5
        return self.model.pool.tensor(self.name(f"{part}.weight"), (n_embd, n_embd), self.model.kind, sigma)

    def up(self) -> Floats:
        """[n_ff, n_embd]"""
        model, shape = self.model, self.model.shape
        values = self._rows("ffn_up.weight", model.sparsity.noise / shape.n_embd**0.5)
        for start in range(0, shape.n_ff, _CHUNK):
            part = slice(start, start + _CHUNK)
            values[part] += (self.plan.directions[part] * self._signal) @ model.code_directions.T
        return values

    def up_bias(self) -> Floats:
        return -self.plan.thresholds

    def down(self) -> Floats:
        """The transposed down matrix: [n_ff, n_embd]."""
        power = (1 - _ATTENTION) * _GROWTH / self.model.shape.n_layer
        return self._rows("ffn_down.weight", (power / self.plan.output_power) ** 0.5)

    def predictor_in(self) -> Floats:
        """[WIDTH, n_embd]: the code's part of the normalised vector."""
        return np.ascontiguousarray(self.model.code_directions.T)

    def predictor_out(self) -> Floats:
        """[n_ff, WIDTH]"""
        return np.asarray(self.plan.directions * self._signal, np.float32)

    def predictor_bias(self) -> Floats:
        sparsity = self.model.sparsity
        return np.asarray(self.up_bias() + sparsity.margin * sparsity.noise, np.float32)

    @property
    def _signal(self) -> float:
        """Length of the code's part of a row of up: makes the variance of its product with a code 1 - noise^2."""
        model, shape = self.model, self.model.shape
        # the residual stream's variance at this layer, and with it the size of a code in the normalised vector
        variance = 1 + _POSITIONS + _GROWTH * (self.il + 0.5) / shape.n_layer
        # what is not code is spread over all directions, those of the code too
        code_size = ((_CODE_SHARE * shape.n_embd / WIDTH + variance - _CODE_SHARE) / variance) ** 0.5
        return float((1 - model.sparsity.noise**2) ** 0.5 / code_size)

    def _rows(self, tensor: str, sigma: float) -> Floats:
        """Random rows of neurons, in the file's order."""
        shape = self.model.shape
        values = self.model.normal(self.name(tensor), (shape.n_ff, shape.n_embd), sigma)
        return values[self.plan.order] if self.model.coactive else values
